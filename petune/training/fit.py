"""Whether a model can do what a recipe asks, told from its configuration before any weights are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from petune.core.attached.parts import Part, parts
from petune.core.method.arguments import arguments
from petune.core.registry.plugins import registry
from petune.errors import PetuneError, listed
from petune.loading.models import heads, skeleton
from petune.training.places import places
from petune.training.recipe import Recipe

if TYPE_CHECKING:
    from petune.training.tasks import Task


def fitted(recipe: Recipe, *, method: bool = True) -> Recipe:
    """The recipe as the model can do it: where it does not say how long rows and answers may be, they are as long as
    the model has positions for, at most.

    Args:
        method: whether the recipe's method acts, and not one that a caller brings.

    Raises:
        PetuneError: the model has no such head, or too few positions for what the recipe says.
    """
    task: type[Task] = registry().get("petune_tasks", recipe.task)
    _check_head(recipe, task)
    model = skeleton(recipe.model, head=task.head)
    virtual = _virtual_tokens(recipe) if method else 0
    return _with_room(recipe, task, model, virtual)


def check_room(recipe: Recipe, task: Task, model: Any, virtual: int) -> None:
    """See that the model has positions for the rows of a recipe behind so many virtual tokens.

    Raises:
        PetuneError: it has too few.
    """
    room = _room(recipe, type(task), model, virtual)
    if room is not None and recipe.training.max_length > room:
        raise PetuneError(_too_long(recipe, type(task), model, virtual))


def _check_head(recipe: Recipe, task: type[Task]) -> None:
    kind, has = heads(recipe.model)
    if task.head in has:
        return
    tasks: dict[str, type[Task]] = registry().all("petune_tasks")
    can = sorted(name for name, other in tasks.items() if other.head in has)
    remedy = f"its tasks: {listed(can)}" if can else "name another model"
    raise PetuneError(
        f"{recipe.model}: a {kind} has no {task.head!r} head, which the task "
        f"{recipe.task!r} needs; {remedy}."
    )


def _virtual_tokens(recipe: Recipe) -> int:
    """How many tokens the recipe's method puts before each row, as far as its arguments say."""
    chosen = parts(recipe.method, recipe.method_args, recipe.where)
    return sum(map(_length, _prompting(chosen)))


def _prompting(chosen: Iterable[Part]) -> list[Part]:
    """The methods that act as a prompt."""
    return [
        part
        for part in chosen
        if "prompt" in str(part.where or getattr(part.cls, "where", "")).split()
    ]


def _length(part: Part) -> int:
    taken = arguments(part.cls).get("length")
    length: Any = part.arguments.get("length", getattr(taken, "default", 0))
    return length if isinstance(length, int) else 0


def _with_room(recipe: Recipe, task: type[Task], model: Any, virtual: int) -> Recipe:
    most = places(model)
    if most is None:
        return recipe
    given = recipe.training.model_fields_set
    left = most - virtual
    if "max_new_tokens" not in given and _new(recipe, task, model) > left // 2:
        recipe = _with(recipe, max_new_tokens=max(1, left // 2))
    room = left - _new(recipe, task, model)
    if recipe.training.max_length <= room:
        return recipe
    if "max_length" in given or room < 2:
        raise PetuneError(_too_long(recipe, task, model, virtual))
    return _with(recipe, max_length=room)


def _with(recipe: Recipe, **settings: int) -> Recipe:
    training = recipe.training.model_copy(update=settings)
    return recipe.model_copy(update={"training": training})


def _room(recipe: Recipe, task: type[Task], model: Any, virtual: int) -> int | None:
    """The longest rows that the model has positions for; None where it has them for any."""
    most = places(model)
    return None if most is None else most - virtual - _new(recipe, task, model)


def _new(recipe: Recipe, task: type[Task], model: Any) -> int:
    """The tokens that follow a row in the same stack: an encoder-decoder's are in the other."""
    alone = not task.generates or model.config.is_encoder_decoder
    return 0 if alone else recipe.training.max_new_tokens


def _too_long(recipe: Recipe, task: type[Task], model: Any, virtual: int) -> str:
    new, room = _new(recipe, task, model), _room(recipe, task, model, virtual) or 0
    more = [f"{virtual} virtual tokens"] if virtual else []
    more += [f"training.max_new_tokens={new}"] if new else []
    beside = f" beside {' and '.join(more)}" if more else ""
    most = f"at most {room}" if room > 1 else "none"
    return (
        f"training.max_length={recipe.training.max_length}: {recipe.model} has positions for "
        f"{places(model)} tokens, which leaves {most} for a row{beside}."
    )
