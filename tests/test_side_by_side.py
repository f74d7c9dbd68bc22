"""Parts of a micro-batch on two streams: the same gradient, the same bits each time, and only where it pays."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_trainer import LoRAConfig, LossOutput, Trainer, _blas, runtime, side_by_side, step
from mlx_trainer.data.batches.padded import collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import UnpaddedBatch, collate_unpadded
from mlx_trainer.models import CausalLMModule, causal_lm
from mlx_trainer.models.memory import estimate
from mlx_trainer.models.recomputation import POLICIES, Policy
from mlx_trainer.side_by_side import AT_ONCE, dispatched_in_step, second_stream, streams
from tests.models.test_memory import ALL, QV, batch_of_size, measured
from tests.models.test_unpadded import LINEARS, module_of, rows_of
from tests.test_step import Gradients, built
from tests.test_trainer import SaveAt
from tests.tiny import tiny_mistral
from tests.toy import ToyBatch, ToyLoader, ToyModule, toy_batches, weights

pytestmark = pytest.mark.skipif(not runtime.linux_cpu(), reason="only a Linux CPU computes on two streams")

SIZES = [(256, 4, ALL, 10), (128, 8, QV, 14), (128, 12, ALL, 12)]
"""Hidden size, layers, adapters, rows."""


class Divided(ToyModule):
    """Two parts of each batch with two rows or more; notes the streams that losses are traced on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.traced_on: list[mx.Stream] = []

    def parts(self, batch: ToyBatch) -> Sequence[ToyBatch]:
        names, middle = ("x", "y", "weight"), len(batch.y) // 2
        parts = [slice(middle), slice(middle, None)] if middle else [slice(None)]
        return [attrs.evolve(batch, **{name: getattr(batch, name)[part] for name in names}) for part in parts]

    def training_loss(self, batch: ToyBatch) -> LossOutput:
        self.traced_on.append(mx.default_stream(mx.cpu))
        return super().training_loss(batch)


@pytest.fixture(autouse=True)
def two_streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However many CPUs there are here."""
    monkeypatch.setattr(step, "streams", lambda: [None, second_stream()])
    yield
    mx.synchronize()


@pytest.mark.parametrize("sizes", [(4,), (5, 2), (3, 1, 4)])
def test_parts_give_the_gradient_of_the_whole(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without accumulation, a batch without parts among them; loss, weight and metrics are sums too."""
    batches = toy_batches(sizes)
    parted = built(Divided(dropout=0.0), Gradients(), accumulate=len(sizes))
    output = parted(batches)
    monkeypatch.setattr(step, "streams", lambda: [None])
    whole = built(Divided(dropout=0.0), Gradients(), accumulate=len(sizes))
    expected = whole(batches)

    assert output.weight.item() == expected.weight.item()
    assert output.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert output.metrics["absolute_error"].item() == pytest.approx(expected.metrics["absolute_error"].item(), rel=1e-6)
    for (name, one), (_, other) in zip(
        *map(tree_flatten, (parted.optimizer.state, whole.optimizer.state)), strict=True
    ):
        assert mx.abs(one - other).max().item() <= 1e-6 * max(mx.abs(other).max().item(), 1e-12), name


def test_parts_are_computed_on_two_streams() -> None:
    """The first where everything else is; a shape is traced once on each."""
    module = Divided()
    taken = built(module)
    for batch in toy_batches((4, 4, 4, 1)):
        taken([batch])
    default, other, alone = module.traced_on
    assert default == alone == mx.default_stream(mx.cpu) != other
    assert taken.compiled_shapes == 2


def test_the_bits_are_those_of_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps with dropout and AdamW, twice on two streams and once on one, whatever waits for what."""

    def trained() -> dict[str, Any]:
        module = Divided()
        taken = built(module)
        mx.random.seed(5)
        for batch in toy_batches((4, 3) * 10):
            taken([batch])
        return weights(module)

    expected = trained()
    assert trained() == expected
    monkeypatch.setattr(step, "streams", lambda: [None, None])
    assert trained() == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_continues_bit_for_bit(accumulate: int, tmp_path: Path) -> None:
    """Shuffled uneven batches with dropout, as if never interrupted."""

    def run(callback: SaveAt, **options: Any) -> Any:
        module = Divided()
        Trainer(max_epochs=2, accumulate=accumulate, callbacks=[callback], **options).fit(
            module, ToyLoader(toy_batches())
        )
        return weights(module), mx.random.state[0].tolist()

    expected = run(SaveAt(3, tmp_path / "checkpoint"))
    assert run(SaveAt(0, tmp_path / "none"), resume=tmp_path / "checkpoint") == expected


def test_a_part_that_cannot_be_traced_leaves_the_step_as_it_was() -> None:
    """The second half fails; what follows is as if the step had not been tried."""
    batches = toy_batches((4, 6))

    class Failing(Divided):
        def training_loss(self, batch: ToyBatch) -> LossOutput:
            if len(self.traced_on) == 3:
                self.traced_on.clear()
                raise ValueError("no")
            return super().training_loss(batch)

    module, expected = Failing(), Divided()
    taken, other = built(module), built(expected)
    mx.random.seed(5)
    taken(batches[:1])
    with pytest.raises(ValueError, match="no"):
        taken(batches[1:])
    taken(batches[1:])
    mx.random.seed(5)
    other(batches[:1])
    other(batches[1:])
    assert taken.sound
    assert weights(module) == weights(expected)


def test_gradients_are_asked_for_a_few_at_a_time_the_last_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sums, which are there when the forward pass is, before all others."""
    asked: list[list[int]] = []
    monkeypatch.setattr(side_by_side, "dispatched", lambda *trees: asked.append([x for tree in trees for x in tree]))
    dispatched_in_step([-1], {"layers": [{"a": i, "b": i + 1} for i in range(0, 10, 2)]})
    assert asked == [[-1, 9, 8, 7, 6], [5, 4, 3, 2], [1, 0]]
    assert AT_ONCE == 4


@pytest.mark.parametrize(
    ("cpus", "threads", "linux", "two"),
    [
        (2, 1, True, True),
        (8, 1, True, True),
        (1, 1, True, False),
        (4, 3, True, False),
        (2, 0, True, False),
        (2, 1, False, False),
    ],
)
def test_there_are_two_streams_where_they_pay(
    cpus: int, threads: int, linux: bool, two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Linux CPUs, two or more of them, whose other cores BLAS leaves alone; always the same second one."""
    monkeypatch.setattr(runtime, "available_cpus", lambda: cpus)
    monkeypatch.setattr(runtime, "linux_cpu", lambda: linux)
    monkeypatch.setattr(_blas, "threads_used", threads)
    assert streams() == ([None, second_stream()] if two else [None])
    assert second_stream() is second_stream()


# A language model's batches.


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> CausalLMModule:
    """A tiny Mistral with adapters on every linear layer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_mistral(folder)
    return module_of(folder, lora=LoRAConfig(rank=4, dropout=0.0, target_modules=LINEARS))


def batch_of(lengths: Sequence[int]) -> UnpaddedBatch:
    """Uneven rows, two thirds of their tokens trained."""
    rows = rows_of(lengths, [[i % 3 > 0 for i in range(n - 1)] for n in lengths], 0)
    shape = Shape(len(lengths), max(lengths), min(sum(lengths) + 5, len(lengths) * max(lengths)))
    return collate_unpadded(rows, shape, sum(lengths))


def test_halves_of_a_language_models_batch_have_its_gradient(
    module: CausalLMModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the order of sums, padded or not."""
    monkeypatch.setattr(causal_lm, "WORTH_HALVING", 0)
    lengths = (21, 20, 18, 18, 17)
    rows = rows_of(lengths, [[i % 3 > 0 for i in range(n - 1)] for n in lengths], 0)
    for batch in (batch_of(lengths), collate(rows, Shape(5, 24, 0))):
        assert len(module.parts(batch)) == 2
        found = []
        for used in ([None, second_stream()], [None]):
            monkeypatch.setattr(step, "streams", lambda used=used: used)
            optimizer = Gradients()
            optimizer.init(module.model.trainable_parameters())
            output = step.TrainStep(module, optimizer)([batch])
            found.append((output.total.item(), output.weight.item(), dict(tree_flatten(optimizer.state))))
        (total, weight, gradients), (expected, of, wanted) = found
        assert (weight, total) == (of, pytest.approx(expected, rel=1e-5))
        for name, gradient in wanted.items():
            assert mx.abs(gradients[name] - gradient).max().item() <= 1e-5 * max(mx.abs(gradient).max().item(), 1e-9), (
                name
            )


def test_only_large_batches_and_the_losses_of_the_package_are_divided(module: CausalLMModule, tmp_path: Path) -> None:
    """A loss of one's own may look at rows together; below so many numbers, halves cost more than they bring."""

    class Own(CausalLMModule):
        def training_loss(self, batch: Any) -> LossOutput:
            return super().training_loss(batch)

    hidden = module.settings["hidden_size"]
    small, large = (batch_of([n] * 16) for n in (causal_lm.WORTH_HALVING // hidden // 16 - 1, 80))
    assert [len(module.parts(batch)) for batch in (small, large)] == [1, 2]
    tiny_mistral(tmp_path)
    assert len(Own(tmp_path).parts(large)) == 1
    assert Own(tmp_path).parts({"mine": 1}) == [{"mine": 1}]


def test_a_half_is_estimated_as_both(module: CausalLMModule) -> None:
    """Both halves keep together what the batch would, and have less in flight."""
    batch, optimizer = batch_of([40, 39, 38, 37, 36, 35, 34]), module.configure_optimizer(10)
    whole = estimate(module.model, batch, optimizer, "none")
    found = [estimate(module.model, half, optimizer, "none") for half in batch.halves()]
    assert 0.4 < found[0].in_flight / whole.in_flight < 1
    assert [attrs.evolve(half, in_flight=whole.in_flight) for half in found] == [whole] * 2


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("hidden", "layers", "adapted", "rows"), SIZES)
def test_the_estimate_is_within_a_tenth(
    tmp_path: Path, hidden: int, layers: int, adapted: LoRAConfig, rows: int, policy: Policy
) -> None:
    """Of the measured peak, as it is for whole batches."""
    tiny_mistral(tmp_path, hidden_size=hidden, layers=layers)
    module = CausalLMModule(tmp_path, dtype="float32", lora=adapted, recompute=policy, max_seq_length=256)
    module.setup("fit")
    mx.eval(module.model.parameters())
    batch = batch_of_size(rows, 48)
    half, _ = module.parts(batch)
    expected = estimate(module.model, half, module.configure_optimizer(1_000), policy)
    mx.enable_compile()
    assert expected.peak == pytest.approx(measured(module, batch), rel=0.1)
