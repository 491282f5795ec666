"""What a method is: an `Adapter` around one computation of the frozen model, or an `Unfreeze` of parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Gt
from torch import Tensor, nn

if TYPE_CHECKING:  # they load transformers, which a module of methods does without
    from petune.core.frozen.site import Site
    from petune.core.method.twin import PeftTwin


Inner = Callable[..., Tensor]


Positive = Annotated[int, Gt(0)]
"""The type of a rank, a width, a number of tokens: an argument that is not is refused by name."""


class Adapter(nn.Module):
    """Stands around one computation of the frozen model.

    A method subclasses this. The keyword arguments of `__init__` are its hyperparameters: the saved JSON, the
    command line and the validation of recipes all come from that signature. `forward` states the equation; what
    it gets depends on the kind of site:

    * linear, block: `forward(inner, x)`, x and the result (batch, length, features)
    * attention: `forward(inner, q, k, v, mask)`, q (batch, heads, length, head_dim), k and v with the number of
      key/value heads; mask is None or broadcastable to (batch, heads, queries, keys). The result is
      (batch, length, heads, head_dim). Keys that `forward` puts on the left of k are visible to every query:
      `inner` extends the mask and the position bias itself.
    * embedding: `forward(inner, ids)`, ids (batch, length), the result (batch, length, features)
    * prompt: `forward()`, the result (length, hidden); the class has an attribute `length`

    `inner` is the frozen computation and whatever is stacked inside it. Call it once with the input, as it is or
    changed. It is a map like any other, so that something else may run through it too (DoRA learns W Aᵀ by the rows
    of A), at the cost of another pass.

    A `forward` may ask for more by keywords of these names:

    * `batch`: the `Batch` that the model was called with.
    * `notes`: a dict that all sites of the tuning share within one forward of the model, empty when it begins.
    * `experts`: then it acts on stacked experts too, where a model keeps a projection of all experts in one parameter
      (`site.experts` of them). There x is (rows, features), sorted by expert, and `experts` lists how many rows each
      has; at any other site it is left to its default.
    """

    where: ClassVar[str] = ""
    """Roles at which the method acts if the user names none, separated by spaces."""
    also: ClassVar[str] = ""
    """Roles at which it acts too, where the user names them."""
    mergeable: ClassVar[bool] = False
    """The adapted layer is an affine map of its input (a norm: scaled and shifted), so it can be folded in."""
    peft: ClassVar[PeftTwin | None] = None
    """How PEFT names the same method, for its folder format."""
    starts_at_base: ClassVar[bool] = True
    """A fresh adapter changes nothing; a prompt or a prefix does."""

    def plain(self) -> Mapping[str, Tensor]:
        """The tensors that say what the adapter computes, without what only helps to train it: what is exported."""
        return self.state_dict(keep_vars=True)

    def drawn(self) -> Mapping[str, Tensor]:
        """Tensors that the arguments determine and PEFT saves along: written with the others, compared when read."""
        return {}

    @classmethod
    def settle(cls, sites: Sequence[Site], arguments: dict[str, Any]) -> dict[str, Any]:
        """What the arguments given come to on the sites picked, once for all, before any adapter is made. The result
        is what is saved: it must do without files that are not part of the tuning.
        """
        return arguments

    @classmethod
    @contextmanager
    def step(cls, adapters: Sequence[Any], step: int, total: int) -> Iterator[None]:
        """For a method with a schedule. Stands around each step of the optimizer with all adapters of a tuning, the
        gradients there: what precedes the `yield` can change them, what follows it sees the updated parameters.

        Args:
            step: which one, from 0 to total - 1.
        """
        yield

    def learning_rates(self) -> Mapping[str, float]:
        """How many times the learning rate a parameter learns at, by its name; once for those left out."""
        return {}


class Unfreeze:
    """A method that adds nothing and trains parameters of the base.

    The base keeps its own values: what trains is a float32 copy beside them, so that the tuning can be switched,
    saved and detached like any other, also where the base is quantized.
    """

    mergeable: ClassVar[bool] = True
    where: ClassVar[str] = "parameters"

    def modules(self, sites: list[Site]) -> Iterable[str]:
        """Names of the modules that train, with all that is inside them; "" is the whole model."""
        raise NotImplementedError
