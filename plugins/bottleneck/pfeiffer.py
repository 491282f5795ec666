from .houlsby import Houlsby


class Pfeiffer(Houlsby):
    """h + U gelu(D h), behind the MLP alone   (Pfeiffer et al. 2020, arXiv:2005.00247).

    Acts on what the MLP adds to the residual stream. U starts at zero, so that training starts at the base.
    """

    where = "mlp"
