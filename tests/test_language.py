"""Decoders, their files, their tokens and their losses."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from madjax.data.text import load_pairs, load_prompts
from madjax.interop.huggingface import read_adapter, read_folder
from madjax.losses import from_decoder
from madjax.models.decoder import Decoder, DecoderConfig
from madjax.models.finetune import train_decoder
from madjax.models.generate import complete, completion_batch, prompt_batch
from madjax.models.load_decoder import load_decoder, read_language_files, torch_name
from madjax.models.lora import LINEAR, add_lora, load_lora

CONFIG = DecoderConfig(
    vocab_size=48, size=16, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, context=40
)
GEMMA2 = dataclasses.replace(
    CONFIG, activation="gelu", unit_offset=True, post_norms=True, query_size=6.0, attention_cap=2.0, logit_cap=3.0,
    window=3,
)  # fmt: skip
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="transformers and torch are not installed",
)


def decoder(config=CONFIG, seed=0):
    """A decoder whose norms and attention are not the identity that they are to begin with."""
    model = Decoder(config, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(seed)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype("f"), state))


def logits(model, tokens, positions=None, **more):
    """Logits of tokens `[n, length]`, compiled."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state: nnx.merge(graphdef, state)(tokens, positions, **more))(state))


def sequences(rng, sizes, highest=48):
    return [rng.integers(1, highest, size).tolist() for size in sizes]


def folder_of(model, path, **more):
    """A Hugging Face folder with the model's weights in two shards."""
    config = model.config
    path.mkdir(parents=True)
    told = {
        "model_type": "gemma2" if config.post_norms else "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.size, "intermediate_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size, "max_position_embeddings": config.context, "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied, "rope_theta": config.rope_base, **more,
    }  # fmt: skip
    if config.post_norms:
        told |= {
            "query_pre_attn_scalar": config.query_size, "attn_logit_softcapping": config.attention_cap,
            "final_logit_softcapping": config.logit_cap, "sliding_window": config.window,
        }  # fmt: skip
    (path / "config.json").write_text(json.dumps(told))
    weights = {}
    for place, variable in nnx.to_flat_state(nnx.state(model)):
        *module, leaf = map(str, place)
        array = np.asarray(variable.get_value())
        weights[f"{torch_name('.'.join(module), config)}.weight"] = np.ascontiguousarray(
            array.T if leaf == "kernel" else array
        )
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({name: weights[name] for name in some}, path / file)
    index = {"weight_map": {name: file for file, some in shards.items() for name in some}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("config", [CONFIG, GEMMA2], ids=["llama", "gemma2"])
def test_padding_on_either_side_changes_no_logit(config):
    model = decoder(config)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 7)).astype(np.int32)
    positions = np.broadcast_to(np.arange(7, dtype=np.int32), tokens.shape)
    alone, padding = logits(model, tokens), ((0, 0), (3, 2))
    padded = logits(model, np.pad(tokens, padding, constant_values=5), np.pad(positions, padding, constant_values=-1))
    np.testing.assert_allclose(padded[:, 3:-2], alone, atol=1e-5)
    np.testing.assert_allclose(logits(model, tokens, last=2), alone[:, -2:], atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, GEMMA2], ids=["llama", "gemma2"])
def test_a_token_depends_on_those_before_it_alone(config):
    model = decoder(config)
    tokens = np.random.default_rng(1).integers(0, 48, (1, 8)).astype(np.int32)
    other = tokens.copy()
    other[0, 5] = (other[0, 5] + 1) % 48
    before, after = logits(model, tokens), logits(model, other)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before - after)[:, 5:].max() > 1e-2


@pytest.mark.parametrize("config", [CONFIG, GEMMA2], ids=["llama", "gemma2"])
def test_a_completion_is_what_one_token_at_a_time_gives(config):
    model = decoder(config, seed=3)
    prompts = sequences(np.random.default_rng(2), (5, 2, 7))
    done = complete(model, prompt_batch(prompts, 9), num_tokens=6, batch_size=2)
    for prompt, completion, length in zip(prompts, done["completion"], done["completion_length"], strict=True):
        assert length == 6
        whole = np.array([[*prompt, *completion]], np.int32)
        np.testing.assert_array_equal(completion, logits(model, whole)[0, len(prompt) - 1 : -1].argmax(-1))


def test_a_completion_ends_with_the_end_token():
    model = decoder(seed=3)
    prompts = prompt_batch(sequences(np.random.default_rng(2), (5, 2, 7)))
    free = complete(model, prompts, num_tokens=6)
    end = int(free["completion"][0, 2])
    done = complete(model, prompts, num_tokens=6, end_tokens=[end])
    for before, after, length in zip(free["completion"], done["completion"], done["completion_length"], strict=True):
        wanted = list(before).index(end) + 1 if end in before else 6
        assert length == wanted
        np.testing.assert_array_equal(after[:wanted], before[:wanted])
        assert not after[wanted:].any()


def test_the_loss_is_that_of_each_token_by_itself():
    model = decoder()
    rng = np.random.default_rng(4)
    prompts, completions = sequences(rng, (3, 6)), sequences(rng, (4, 1))
    batch = prompt_batch(prompts, 8) | completion_batch(completions, 5)
    loss_fn, params = from_decoder(model)
    tokens = np.asarray(loss_fn.tokens(params, batch))
    for row, prompt, completion in zip(tokens, prompts, completions, strict=True):
        whole = np.array([prompt + completion], np.int32)
        values = logits(model, whole)[0].astype(np.float64)
        log_probabilities = values - np.log(np.exp(values).sum(-1, keepdims=True))
        wanted = [-log_probabilities[len(prompt) - 1 + i, token] for i, token in enumerate(completion)]
        np.testing.assert_allclose(row[: len(completion)], wanted, atol=1e-5)
        assert not row[len(completion) :].any()
    np.testing.assert_allclose(loss_fn(params, batch), tokens.sum(1) / [4, 1], atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, GEMMA2], ids=["llama", "gemma2"])
def test_a_folder_of_shards_comes_back(config, tmp_path):
    model = decoder(config)
    read = load_decoder(read_language_files(folder_of(model, tmp_path / "model")))
    assert read.config == config
    for before, after in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(read)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_bad_folders_are_told_in_one_line(tmp_path):
    model = decoder()
    folder = folder_of(model, tmp_path / "model")

    def error(change):
        change()
        with pytest.raises(ValueError, match="path: ") as caught:
            load_decoder(read_language_files(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    config = json.loads((folder / "config.json").read_text())
    write = (folder / "config.json").write_text
    assert "architecture 'mamba'" in error(lambda: write(json.dumps(config | {"model_type": "mamba"})))
    assert "rotary positions are 'yarn'" in error(
        lambda: write(json.dumps(config | {"rope_scaling": {"type": "yarn"}}))
    )
    assert "num_hidden_layers, got -1" in error(lambda: write(json.dumps(config | {"num_hidden_layers": -1})))
    assert "model.layers.1.mlp.up_proj.weight has no place" in error(
        lambda: write(json.dumps(config | {"num_hidden_layers": 1}))
    )
    assert "is missing" in error(lambda: write(json.dumps(config | {"tie_word_embeddings": False})))
    assert "no JSON" in error(lambda: write("{"))
    write(json.dumps(config))
    assert "lacks 1 of 2 files of weights" in error(lambda: (folder / "b.safetensors").rename(folder / "c"))
    assert "cannot be read as safetensors" in error(lambda: (folder / "b.safetensors").write_bytes(b"\xff" * 64))
    with pytest.raises(ValueError, match="is not there"):
        read_folder(tmp_path / "nothing")


@needs_transformers
@pytest.mark.parametrize("family", ["llama", "llama3", "gemma", "gemma2"])
def test_logits_equal_those_of_transformers(family, tmp_path):
    import torch
    import transformers as hf

    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    config, kind = {
        "llama": (hf.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True), hf.LlamaForCausalLM),
        "llama3": (hf.LlamaConfig(**sizes, tie_word_embeddings=True, rope_parameters=rope), hf.LlamaForCausalLM),
        "gemma": (hf.GemmaConfig(**sizes, head_dim=16), hf.GemmaForCausalLM),
        "gemma2": (hf.Gemma2Config(**sizes, head_dim=16, sliding_window=4, query_pre_attn_scalar=20),
                   hf.Gemma2ForCausalLM),
    }[family]  # fmt: skip
    torch.manual_seed(0)
    theirs = kind(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)
    wanted = theirs(torch.tensor(tokens.astype(np.int64))).logits.detach().numpy()
    ours = load_decoder(read_language_files(tmp_path))
    assert np.abs(wanted).max() > 3
    np.testing.assert_allclose(logits(ours, tokens), wanted, atol=1e-4)


def adapter_of(path, rank, arrays, **more):
    path.mkdir()
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "some/base"} | more
    (path / "adapter_config.json").write_text(json.dumps(told))
    save_file(arrays, path / "adapter_model.safetensors")
    return path


def test_an_adapter_adds_its_product(tmp_path):
    model, rng = decoder(), np.random.default_rng(6)
    a, b = rng.normal(size=(3, 16)).astype("f"), rng.normal(size=(16, 3)).astype("f")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    files = adapter_of(tmp_path / "lora", 3, {name.format("A"): a, name.format("B"): b})
    merged = decoder()
    merged.layers[1].attention.q.kernel[...] += 2 * (b @ a).T  # alpha / r is 2
    load_lora(model, read_adapter(files), "some/base")
    tokens = np.arange(1, 6, dtype=np.int32)[None]
    np.testing.assert_allclose(logits(model, tokens), logits(merged, tokens), atol=1e-4)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    a, b = np.ones((3, 99), "f"), np.ones((16, 3), "f")
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    wide = adapter_of(tmp_path / "wide", 3, {name.format(0, "A"): a, name.format(0, "B"): b})
    deep = adapter_of(tmp_path / "deep", 3, {name.format(7, "A"): a[:, :16], name.format(7, "B"): b})
    more = adapter_of(tmp_path / "more", 3, {name.format(0, "A"): a}, use_dora=True)
    for path, base, message in [
        (wide, None, r"another base: .*q_proj has shapes \(\(3, 99\), \(16, 3\)\), wanted \(\(3, 16\)"),
        (deep, None, "another base: .*layers.7.* has no place"),
        (wide, "other/base", "is for 'some/base', the model is 'other/base'"),
        (more, None, "asks for use_dora"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_lora(decoder(), read_adapter(path), base)


def test_new_adapters_change_nothing_until_they_are_trained():
    model, rng = decoder(), np.random.default_rng(7)
    batch = prompt_batch(sequences(rng, [4] * 16)) | completion_batch(sequences(rng, [3] * 16))
    loss_fn, params = from_decoder(model)
    before = np.asarray(loss_fn(params, batch))
    add_lora(model, 4, rngs=nnx.Rngs(1))
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 2 * len(LINEAR) * 2
    frozen = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam)))]
    loss_fn, params = from_decoder(model)
    np.testing.assert_allclose(loss_fn(params, batch), before, atol=1e-6)
    train_decoder(
        model, batch, rng_key=jax.random.key(0), num_epochs=6, learning_rate=0.05, batch_size=8, parameters="lora_",
        progress=False,
    )  # fmt: skip
    after = np.asarray(loss_fn(from_decoder(model)[1], batch))
    assert after.mean() < 0.7 * before.mean()
    for old, new in zip(frozen, jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam))), strict=True):
        np.testing.assert_array_equal(old, new)


def test_prompts_are_read_from_lines_and_json(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"one\n\xff two\nthree\n")
    lines = load_prompts(tmp_path / "p.txt")
    assert (len(lines), lines[0], lines[2]) == (3, "one", "three")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n"b"\n\n{"instruction": "c", "input": "d", "output": "e"}\n')
    assert load_prompts(tmp_path / "p.jsonl") == ["a", "b", "c\nd"]
    (tmp_path / "p.json").write_text('[{"instruction": "c", "output": "e"}, 7]')
    with pytest.raises(ValueError, match="item 1 of"):
        load_pairs(tmp_path / "p.json")


def test_sizes_that_cannot_be_are_told():
    model, prompts = decoder(), prompt_batch([[1, 2]])
    with pytest.raises(ValueError, match="num_tokens: prompts of 2 tokens and 39 more exceed the context of 40"):
        complete(model, prompts, num_tokens=39)
    with pytest.raises(ValueError, match="completions: wanted at least one token in each, got none at 1"):
        completion_batch([[1], []])
    with pytest.raises(ValueError, match="length: 1 is less than the 2 tokens"):
        prompt_batch([[1, 2]], 1)
    batch = prompts | completion_batch([[1]])
    for settings, message in [({"parameters": "nothing"}, "'nothing' matches none"), ({"batch_size": 4}, "1 examples")]:
        with pytest.raises(ValueError, match=message):
            train_decoder(model, batch, rng_key=jax.random.key(0), num_epochs=1, learning_rate=1.0,
                          **{"batch_size": 1, **settings})  # fmt: skip
