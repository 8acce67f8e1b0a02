"""The sweep: draws × examples -> loss matrix, one compiled program called block by block.

A call of the program takes a block of draws and a chunk of examples and returns their losses; the parameters of each
draw are made inside it, so nothing but the matrix grows with the number of draws. How the draws of a block are laid out
is an argument, since what is fast on one device is slow on another: XLA's CPU backend turns a convolution under `vmap`
into a grouped one, several times slower, while an accelerator may gain from it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from madjax import hosts
from madjax.prefix import freeze
from madjax.sampling import backward, layerwise
from madjax.sampling.diagnostics import ensure_finite
from madjax.sampling.draws import Draws, Walk
from madjax.sampling.tangent import PASSES, TangentDraws
from madjax.sharding import Placement, place, put_examples, put_model, split
from madjax.store import BLOCK, TraceStore
from madjax.types import Batch, LossFn, LossMatrix, num_examples

# examples that a device holds at a time; more are passed again for every block of draws
_CHUNK = 16_384


class Layout(NamedTuple):
    """How the draws of one call are laid out.

    Attributes:
      kind: "host": one draw a call, the loop is on the host. "scan": a loop in the program, a draw at a time. "vmap":
        all draws of a call at once. "layers": one layer of one draw a call, see `madjax.sampling.layerwise`.
        "gradient": all draws from a gradient of each example, see `madjax.sampling.tangent`; of a large model with
        layers by one of them at a time, see `madjax.sampling.backward`.
      draws_per_call: 1 for "host" and "layers"; of "gradient", which takes all, 0.
    """

    kind: str
    draws_per_call: int

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From "host", "layers", "scan8", "vmap4", ...; a ValueError lists what there is."""
        if text in ("host", "layers"):
            return cls(text, 1)
        if text == "gradient":
            return cls(text, 0)
        if match := re.fullmatch(r"(scan|vmap)([1-9]\d*)", text):
            return cls(match[1], int(match[2]))
        raise ValueError(f"layout: wanted auto, host, layers, scanK or vmapK with a number of draws K, got {text!r}")

    def __str__(self) -> str:
        return self.kind if self.kind in ("host", "layers", "gradient") else f"{self.kind}{self.draws_per_call}"


CANDIDATES = (Layout("host", 1), Layout("scan", 8), Layout("vmap", 4))
# what "auto" picked, by program and shapes: a second sweep of the same kind need not time again
_picked: dict[Any, Layout] = {}


def loss_matrix(
    loss_fn: LossFn,
    draws: Draws,
    examples: Batch,
    *,
    layout: str = "auto",
    batch_size: int = 256,
    devices: Sequence[Any] | None = None,
    model_shards: int = 1,
    store: TraceStore | None = None,
    progress: bool = False,
) -> LossMatrix:
    """The loss of every example at every draw.

    With several hosts each takes the examples of its `hosts.host_range`, and the result is gathered on all.

    Args:
      loss_fn: `(params, batch) -> float32 [n]`. Two calls with equal functions share one compilation.
      draws: `GaussianDraws`, `ChainDraws` or anything with the methods of `Draws`.
      examples: pytree of arrays with one leading axis, on the host or on the devices.
      layout: see `Layout.parse`; "auto" is "gradient" for draws of a tangent, "layers" for other Gaussian ones of a
        loss that has layers, such as a decoder's, and otherwise the fastest of a few of which it times one block.
      batch_size: examples of one forward pass on one device.
      devices: all of this host where None.
      model_shards: over how many devices of a host the parameters are split, for a model too large for one.
      store: where every block goes once it is whole, as does what is done of a block when SIGTERM or Ctrl-C ends the
        sweep; what is there is not computed again.

    Returns:
      Float32 `[num_draws, num_examples]` on the host. It does not depend on layout, batch size or devices beyond
      rounding, and not at all on interruptions.

    Raises:
      ValueError: no draws or examples, examples of unequal lengths, a loss that is not one number an example, layout
        "layers" for draws or a loss that cannot be taken apart, "gradient" for other draws than a tangent's, or another
        for those.
      FloatingPointError: a loss is not finite; the message names draw and example.
    """
    count, num_draws = num_examples(examples), draws.num_draws
    if count < 1:
        raise ValueError("examples: wanted at least one, got none")
    if num_draws < 1:
        raise ValueError(f"draws: wanted at least one, got {num_draws}")
    here = hosts.host_range(count)
    count_here = here.stop - here.start
    placement = place(count_here, devices, model_shards)
    batch_size = min(batch_size, max(1, -(-count_here // placement.parts("examples"))))
    draws = put_model(draws, placement)
    own = jax.tree.map(lambda leaf: leaf[here], examples)
    drawn = draws.drawn
    if store is not None:
        layout = store.facts.get("layout", layout)  # another would round differently
    if isinstance(draws, TangentDraws) != (layout == "gradient"):
        if layout != "auto":
            raise ValueError(
                f"layout: draws of a tangent, and they alone, are swept by gradient; wanted auto, got {layout}"
            )
        layout = "gradient" if isinstance(draws, TangentDraws) else "auto"
    stages = layerwise.stages(loss_fn, draws) if layout in ("auto", "layers") else None
    if layout == "auto" and stages is not None:
        layout = "layers"
    if layout == "layers" and stages is None:
        raise ValueError("layout: layers is for Gaussian draws of a loss that has stages, such as a Decoder's")
    multiple = batch_size * placement.parts("examples")
    if count_here and drawn is not None and layout not in ("layers", "gradient"):
        center = partial(draws.params, draws.any_item())
        put = partial(put_examples, placement=placement)
        loss_fn, own = freeze(loss_fn, center, drawn, own, batch_size=multiple, put=put)
    layers = backward.layers(loss_fn, draws)
    if layout == "layers":
        assert stages is not None
        chunks = _Batches(loss_fn, own, multiple, placement)
        stages, chunks.batches = layerwise.freeze(stages, chunks.batches)
    elif layers is not None:
        assert isinstance(draws, TangentDraws)
        batch_size = min(batch_size, backward.most_at_a_time(layers))
        chunks = _Batches(loss_fn, own, batch_size * placement.parts("examples"), placement)
    else:
        chunks = _Chunks(own, count_here, batch_size, placement, batch_size if layout == "gradient" else _CHUNK)
        if layout == "auto":
            picked = _pick(loss_fn, draws, chunks.probe(), batch_size, placement) if count_here else None
            layout = hosts.first(str(picked))
    chosen = Layout.parse(layout)
    if chosen.kind == "gradient":
        chosen = chosen._replace(draws_per_call=-(-num_draws // placement.parts("draws")))
    size = _block_size(chosen, placement)
    rows = _Rows(store, num_draws, count_here, size)
    walk = draws.items(rows.stop, rows.state)

    def queue(block: list[Any]) -> list[jax.Array]:
        if chosen.kind == "layers":
            assert stages is not None
            return [
                jnp.stack([jnp.concatenate(layerwise.losses(stages, item, chunk)) for item in block])
                for chunk in chunks
            ]
        if layers is not None:
            assert isinstance(draws, TangentDraws)
            items = jnp.asarray(np.array(block))
            return [jnp.concatenate(backward.losses(layers, draws, items, chunk), axis=1) for chunk in chunks]
        items = _put_items(block, size, placement)
        return [_block(loss_fn, chosen.kind, batch_size, placement, draws, items, chunk) for chunk in chunks]

    if store is not None:
        block_size = -(-BLOCK // size) * size
        store.create(num_draws, block_size, str(chosen), _told_apart(draws), walk.info())
    with tqdm(total=num_draws, initial=rows.stop, desc=f"sweep {chosen}", unit="draw", disable=not progress) as bar:
        try:
            while count_here and (block := list(islice(walk, size))):
                # every chunk is queued before the first is waited for
                parts = queue(block)
                losses = np.concatenate([np.asarray(part)[: len(block)] for part in parts], axis=1)
                rows.add(losses[:, chunks.places], walk)
                bar.update(len(block))
        except (KeyboardInterrupt, SystemExit):
            rows.save()
            raise
        finally:
            if store is not None:
                store.flush()  # what was handed over is there, however the sweep ends
    return hosts.gather(rows.losses, count, axis=1)


def forward_passes(loss_fn: LossFn, draws: Draws) -> int:
    """Of one example, in a sweep of the draws."""
    if isinstance(draws, TangentDraws):
        return PASSES + (backward.layers(loss_fn, draws) is not None)
    return draws.num_draws


def _told_apart(draws: Draws) -> dict[str, np.ndarray]:
    """The chain that made each draw, or the part of the parameters that it moves, where there are several."""
    numbers = np.arange(draws.num_draws, dtype=np.int32)
    chains, parts = getattr(draws, "num_chains", 1), getattr(draws, "num_parts", 1)
    told = {"chain": numbers % chains} if chains > 1 else {}
    return told | ({"part": numbers // (draws.num_draws // parts)} if parts > 1 else {})


class _Rows:
    """The rows of the matrix as they come, and how many of them the store has.

    Attributes:
      losses: `[num_draws, num_here]`; stop: rows that are there; state: where the walk stands after them.
    """

    def __init__(self, store: TraceStore | None, num_draws: int, count: int, multiple: int):
        self.losses = np.empty((num_draws, count), np.float32)
        whole = store.whole() if store is not None else self.losses[:0]
        # blocks begin where they would have begun, so that every draw is computed in the same company
        self.stop = len(whole) if len(whole) == num_draws else len(whole) // multiple * multiple
        self.losses[: self.stop] = whole[: self.stop]
        self.state = store.state(self.stop) if store is not None and self.stop else None
        self._store, self._first, self._saved, self._info = store, self.stop, self.stop, {}

    def add(self, losses: np.ndarray, walk: Walk) -> None:
        for offset, row in enumerate(losses):
            ensure_finite(row, f"losses of draw {self.stop + offset}")
        stop = self.stop + len(losses)
        self.losses[self.stop : stop] = losses
        # in one step, for a signal may come at any time
        self.stop, self.state, self._info = stop, walk.state(), walk.info()
        if self._store is not None and (stop - self._saved >= self._store.block or stop == len(self.losses)):
            self.save()

    def save(self) -> None:
        stop, state = self.stop, self.state
        if self._store is None or stop == self._saved:
            return
        seen = {name: values[self._saved - self._first : stop - self._first] for name, values in self._info.items()}
        self._store.write(self._saved, self.losses[self._saved : stop], seen, state)
        self._saved = stop


def _block_size(layout: Layout, placement: Placement) -> int:
    return layout.draws_per_call * placement.parts("draws")


class _Chunks:
    """The examples in pieces of one shape that a device's memory can hold; the padding repeats the last example.

    Attributes:
      places: index of the examples among those of the pieces, end to end.
    """

    def __init__(self, examples: Batch, count: int, batch_size: int, placement: Placement, most: int):
        self.places = slice(count)
        multiple = batch_size * placement.parts("examples")
        size = min(max(1, -(-count // multiple)), max(1, most // batch_size)) * multiple
        self._placement, self._multiple = placement, multiple
        self._padded = jax.tree.map(lambda leaf: _pad(leaf, -count % size), examples)
        self._starts, self._size = range(0, count, size), size
        # the only chunk stays on the devices
        self._resident = [self._slice(0, size)] if len(self._starts) == 1 else None

    def _slice(self, start: int, size: int) -> Batch:
        return put_examples(jax.tree.map(lambda leaf: leaf[start : start + size], self._padded), self._placement)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._resident or (self._slice(start, self._size) for start in self._starts))

    def probe(self) -> Batch:
        """One batch a device."""
        return self._slice(0, self._multiple)


class _Batches:
    """The same for "layers": lists of batches, of whatever shapes the loss cuts them to, or their states at a layer."""

    def __init__(self, loss_fn: LossFn, examples: Batch, batch_size: int, placement: Placement):
        batches, self.places = loss_fn.cut(examples, batch_size)  # pyright: ignore[reportFunctionMemberAccess]
        self.batches = [put_examples(batch, placement) for batch in batches]
        self._size = max(1, _CHUNK // batch_size)

    def __iter__(self) -> Iterator[list[Batch]]:
        return (self.batches[i : i + self._size] for i in range(0, len(self.batches), self._size))


def _pad(leaf: Any, missing: int) -> Any:
    if not missing:
        return leaf
    xp = jnp if isinstance(leaf, jax.Array) else np
    return xp.concatenate([leaf, xp.repeat(leaf[-1:], missing, axis=0)])


def _put_items(block: list[Any], size: int, placement: Placement) -> Any:
    """The items of a block of draws end to end, on the devices."""
    # a short last block is filled up, so that one program serves all
    return put_model(jax.tree.map(_stacked, *block, *block[-1:] * (size - len(block))), placement, stacked=True)


def _stacked(*leaves: Any) -> Any:
    # numbers of draws may be thousands, each of which jnp would take for an array
    return np.array(leaves) if isinstance(leaves[0], np.generic) else jnp.stack(leaves)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _block(
    loss_fn: LossFn, kind: str, batch_size: int, placement: Placement, draws: Draws, items: Any, examples: Batch
) -> jax.Array:
    def on_one_device(draws: Draws, items: Any, examples: Batch) -> jax.Array:
        if isinstance(draws, TangentDraws):
            return draws.losses(loss_fn, items, examples)

        def one_draw(item: Any) -> jax.Array:
            return _draw_losses(loss_fn, draws.params(item), examples, batch_size)

        if kind == "host" or jax.tree.leaves(items)[0].shape[0] == 1:
            return one_draw(jax.tree.map(lambda leaf: leaf[0], items))[None]
        return jax.vmap(one_draw)(items) if kind == "vmap" else jax.lax.map(one_draw, items)

    return split(on_one_device, placement)(draws, items, examples)


def _draw_losses(loss_fn: LossFn, params: Any, examples: Batch, batch_size: int) -> jax.Array:
    count = jax.tree.leaves(examples)[0].shape[0]

    def batch_losses(batch: Batch) -> jax.Array:
        losses = loss_fn(params, batch)
        if jnp.shape(losses) != (batch_size,):
            raise ValueError(
                f"loss_fn: wanted one loss an example, [{batch_size}] for a batch of {batch_size}, "
                f"got shape {jnp.shape(losses)}"
            )
        return losses.astype(jnp.float32)

    if count == batch_size:
        return batch_losses(examples)
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, batch_size, *leaf.shape[1:]), examples)
    return jax.lax.map(batch_losses, batches).reshape(count)


def _pick(loss_fn: LossFn, draws: Draws, probe: Batch, batch_size: int, placement: Placement) -> Layout:
    """The fastest candidate on one batch of examples."""
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), (draws, probe))
    key = (loss_fn, str(shapes), batch_size, placement)
    if key in _picked:
        return _picked[key]
    item = draws.any_item()
    seconds: dict[Layout, float] = {}
    for candidate in CANDIDATES:
        size = _block_size(candidate, placement)
        if size > max(draws.num_draws, placement.parts("draws")):
            continue  # fewer draws than one call would take

        def run(candidate: Layout = candidate, size: int = size) -> float:
            start = time.perf_counter()
            items = _put_items([item], size, placement)
            _block(loss_fn, candidate.kind, batch_size, placement, draws, items, probe).block_until_ready()
            return (time.perf_counter() - start) / candidate.draws_per_call

        run()  # compiles
        seconds[candidate] = run()
        # a second look only at those that may win
        if seconds[candidate] < 1.5 * min(seconds.values()):
            seconds[candidate] = min(seconds[candidate], run(), run())
    _picked[key] = min(seconds, key=seconds.__getitem__)
    return _picked[key]
