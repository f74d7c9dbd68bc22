"""The compiled update: K micro-batches -> transforms -> guard -> optimizer.

For micro-batches b with loss sums L_b and weights w_b the gradient is that of the mean over all their tokens,

    g = (sum over b of dL_b/dp) / (sum over b of w_b)

and not a mean of means. With K = 1 the whole step is one compiled function. With K > 1 each micro-batch is one call,
which adds its gradients to a float32 sum, and a last call updates: a shape is traced once, whatever window it is in.

On a Linux CPU a micro-batch is a call for each of its parts (`TrainerModule.parts`), on two streams, so that two cores
compute; see `side_by_side.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from itertools import cycle
from types import MappingProxyType
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_trainer.failure import TrainingError, dispatched
from mlx_trainer.fusion import on_its_own, spread
from mlx_trainer.joined import Joined
from mlx_trainer.module import LossOutput, TrainerModule
from mlx_trainer.side_by_side import dispatched_in_step, on, streams
from mlx_trainer.traced import Gradients, assign, copied, from_tree, leaves, restored_on_error, shape_key, to_tree

SMALLEST = 2.0**-126
"""The smallest normal float32."""
Sums = tuple[mx.array, mx.array, dict[str, mx.array]]
"""A `LossOutput` as a tree: total, weight, metrics."""
Transform = Callable[..., tuple[Gradients, Mapping[str, mx.array]]]
Guard = Callable[..., mx.array]
ArrayUpdate = Callable[..., dict[str, Any]]
"""A callback's `update_arrays`."""


@attrs.frozen(eq=False, slots=False)
class StepContext:
    """What traced callbacks may look at: the step's mean loss, its weight, its gradients before any transform.

    `reported` are the scalars that the transforms before have reported, by name; `joined` has the gradients' numbers in
    few arrays.
    """

    loss: mx.array
    weight: mx.array
    gradients: Gradients
    reported: dict[str, mx.array] = attrs.field(factory=dict)
    joined: Joined = attrs.Factory(lambda self: Joined.of(self.gradients), takes_self=True)

    @cached_property
    def grad_norm(self) -> mx.array:
        """The global norm of the gradients before any transform, a float32 scalar; computed only if asked for."""
        return norm(self.joined.arrays)


@attrs.frozen(eq=False)
class StepOutput:
    """One step's results, all lazy."""

    total: mx.array
    """The loss summed over the step's tokens."""
    weight: mx.array
    metrics: Mapping[str, mx.array]
    """Sums of the module's metrics."""
    values: Mapping[str, mx.array]
    """Scalars that transforms report."""
    learning_rate: mx.array | None
    verdicts: Mapping[str, mx.array]
    """Whether each guard, by its callback's name, accepted the update; it was made where all did."""


class TrainStep:
    """The update of `module.model` by `optimizer`; call it with the micro-batches of one step.

    Build it when parameters, optimizer state and random state are what they should be: `mx.compile` captures their
    containers, and a container replaced afterwards would be ignored, so it is refused; see `traced.assign`.

    `arrays` are callbacks' own, by name, and `updates` make their next values: they are kept where a guard refuses.
    """

    def __init__(
        self,
        module: TrainerModule,
        optimizer: optimizers.Optimizer,
        accumulate: int = 1,
        transforms: Sequence[Transform] = (),
        guards: Mapping[str, Guard] = MappingProxyType({}),
        updates: Mapping[str, ArrayUpdate] = MappingProxyType({}),
        arrays: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    ) -> None:
        self.module, self.optimizer, self.accumulate = module, optimizer, accumulate
        self.transforms, self.guards, self.updates, self.arrays = transforms, guards, updates, dict(arrays)
        self.sound = True
        """False after an error that left arrays behind which belong to no finished step."""
        self._state: list[Any] = [module.model.state, optimizer.state, self.arrays, mx.random.state]
        self._seen: set[Any] = set()  # shapes, and numbers of sums: each is traced
        self._streams = streams()
        self._told: Any = None  # what is told of the last update

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return mx.compile(function, inputs=self._state, outputs=self._state)

        self._whole, self._add = compiled(self._whole_step), compiled(self._accumulated)
        self._end = compiled(self._update)
        self._zeros = mx.compile(lambda: tree_map(lambda p: mx.zeros(p.shape), module.model.trainable_parameters()))

    @property
    def compiled_shapes(self) -> int:
        """How many distinct shapes of micro-batches were traced so far."""
        return sum(isinstance(each, tuple) for each in self._seen)

    def __call__(self, batches: Sequence[Any]) -> StepOutput:
        """Dispatch one step and return at once; nothing is read from the device."""
        self._refuse_replaced()
        for batch in batches:
            self.module.check_batch(batch)
        divided = [self.module.parts(batch) if len(self._streams) > 1 else [batch] for batch in batches]
        trees = [[to_tree(part) for part in parts] for parts in divided]
        dispatch = dispatched_in_step if any(len(parts) > 1 for parts in trees) else dispatched
        new = {sum(map(len, trees)), *(tuple(map(shape_key, parts)) for parts in trees)} - self._seen
        # What is traced runs Python code, which can fail; what is not leaves that to the backend, and references to
        # older arrays, which would keep MLX from reusing their memory, are not held for that.
        self.sound = bool(new)
        last = self._told, leaves(self.optimizer.state)
        with restored_on_error(self._state[:3]) if new else nullcontext():
            sums, gradients, told = self._made(trees, dispatch)
        self._seen |= new
        self.sound = False
        # An update is many small operations, and the host gets a number of operations ahead of the device: those of a
        # gradient last long enough to make the next step meanwhile. So the update is dispatched when that is made.
        dispatched(last)
        del last  # or the update of these arrays would take memory of its own
        dispatch(sums, gradients)
        self._told = told
        self.sound = True
        return StepOutput(*sums, *told)

    def close(self) -> None:
        """Dispatch the last update too; a model that waits for one can never be freed (mlx 0.32.4).

        Where that fails, it does so again, and is raised, for whoever reads what the update makes.
        """
        if self.sound:
            with suppress(RuntimeError):
                dispatched(self._told, self._state)

    def _refuse_replaced(self) -> None:
        if self.module.model.state is not self._state[0] or self.optimizer.state is not self._state[1]:
            raise TrainingError(
                "module.model or optimizer.state was replaced after the step was compiled, which would train the old "
                "one; put new values into the containers that are there (model.update, traced.assign)"
            )

    def _made(self, trees: Sequence[Sequence[Any]], dispatch: Callable[..., None]) -> tuple[Sums, Gradients, Any]:
        """The step, lazy: its sums, what the update takes, and what is told of it. `trees` are micro-batches' parts."""
        if self.accumulate == 1 and len(trees[0]) == 1:
            whole: tuple[Sums, Gradients, Any] = self._whole(trees[0][0])
            return whole
        gradients, sums = self._zeros(), []
        for parts in trees:
            for part, stream in zip(parts, cycle(self._streams), strict=False):
                with on(stream):
                    part_sums, gradients = self._add(part, gradients)
                sums.append(part_sums)
            if self.accumulate > 1:  # the device works while the host prepares the next one
                dispatch(sums, gradients)
        added, told = self._end(sums, gradients)
        return added, gradients, told

    # From here on everything is traced.

    def _whole_step(self, tree: Any) -> tuple[Sums, Gradients, Any]:
        sums, gradients = self._gradients(tree)
        added, told = self._update([sums], gradients)
        return added, gradients, told

    def _accumulated(self, tree: Any, gradients: Gradients) -> tuple[Sums, Gradients]:
        sums, new = self._gradients(tree)
        return sums, tree_map(lambda total, g: total + g.astype(mx.float32), gradients, new)

    def _gradients(self, tree: Any) -> tuple[Sums, Gradients]:
        batch = from_tree(tree)
        result: tuple[Sums, Gradients] = nn.value_and_grad(
            self.module.model, lambda _: as_sums(self.module.training_loss(batch))
        )(self.module.model)
        return result

    def _update(self, sums: Sequence[Sums], gradients: Gradients) -> tuple[Sums, Any]:
        total, weight, metrics = add_up(sums)
        divisor = mx.maximum(weight.astype(mx.float32), SMALLEST)  # nothing trained: the gradient is zero, not 0/0
        joined = Joined.of(gradients).map(lambda g: g / spread(divisor, g))
        gradients = joined.tree()
        context = StepContext(total / weight, weight, gradients, joined=joined)
        for transform in self.transforms:
            gradients, reported = transform(gradients, context)
            context.reported.update(reported)
        learning_rate, verdicts = self._optimize(gradients, context)
        return (total, weight, metrics), (context.reported, learning_rate, verdicts)

    def _optimize(self, gradients: Gradients, context: StepContext) -> tuple[mx.array | None, dict[str, mx.array]]:
        model, optimizer = self.module.model, self.optimizer
        parameters, state, arrays = model.trainable_parameters(), copied(optimizer.state), copied(self.arrays)
        verdicts = {name: guard(context.loss, gradients, context) for name, guard in self.guards.items()}
        accepted = mx.stack(list(verdicts.values())).all() if verdicts else None
        gradients = tree_map(lambda g, p: g.astype(p.dtype), gradients, parameters)
        refusing = updated_where(accepted, optimizer, model, gradients)
        learning_rate = current_learning_rate(optimizer)
        updated = model.trainable_parameters()
        assign(self.arrays, {name: update(arrays[name], updated, context) for name, update in self.updates.items()})
        if accepted is None:
            return learning_rate, verdicts

        def chosen(new: mx.array, old: mx.array) -> mx.array:
            return mx.where(accepted, new if new.ndim else on_its_own(new), old)

        if not refusing:
            model.update(tree_map(chosen, updated, parameters))
        whole = {name: value for name, value in state.items() if not (refusing and isinstance(value, dict))}
        assign(optimizer.state, {name: tree_map(chosen, optimizer.state[name], old) for name, old in whole.items()})
        assign(self.arrays, tree_map(chosen, copied(self.arrays), arrays))
        return learning_rate, verdicts


def updated_where(accepted: mx.array | None, optimizer: Any, model: nn.Module, gradients: Gradients) -> bool:
    """Update `model`; whether the optimizer leaves parameters and moments as they are where `accepted` is false.

    One that has an attribute `accepted` does, see `optim.AdamW`.
    """
    refusing = accepted is not None and hasattr(optimizer, "accepted")
    if refusing:
        optimizer.accepted = accepted
    try:
        optimizer.update(model, gradients)
    finally:
        if refusing:
            del optimizer.accepted
    return refusing


def as_sums(output: LossOutput) -> Sums:
    """The tree that `mx.value_and_grad` differentiates: its first leaf is the loss."""
    return output.total, output.weight, dict(output.metrics)


def add_up(sums: Sequence[Sums]) -> Sums:
    """The sums of all micro-batches together."""
    totals, weights, metrics = zip(*sums, strict=True)
    return added(*totals), added(*weights), tree_map(added, *metrics)


def added(*arrays: mx.array) -> mx.array:
    """The sum of arrays of one shape, as one reduction: additions are fused, into a kernel for each number of them."""
    return mx.stack(list(arrays)).sum(axis=0) if len(arrays) > 1 else arrays[0]


def global_norm(gradients: Gradients) -> mx.array:
    """The Euclidean norm of all gradients together, summed in float32 whatever they are stored in; a float32 scalar."""
    return norm(Joined.of(gradients).arrays)


def norm(arrays: Sequence[mx.array]) -> mx.array:
    """The same of flat arrays."""
    squares = (mx.square(array.astype(mx.float32)).sum(keepdims=True) for array in arrays)
    return mx.sqrt(mx.concatenate(list(squares)).sum())


def current_learning_rate(optimizer: optimizers.Optimizer) -> mx.array | None:
    """The rate used in the last update, or None for an optimizer without one (Adafactor with relative steps)."""
    try:
        return optimizer.learning_rate  # type: ignore[no-any-return]
    except KeyError:
        return None
