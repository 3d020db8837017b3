"""A fitted predictor of accuracy from cheap scores."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kdnas.specs import check_literals
from kdnas.statistics import kendall

Kind = Literal["linear", "gaussian_process"]


@final
@dataclass(frozen=True, eq=False)
class Predictor:
    """A fitted predictor with its leave-one-out error.

    Attributes:
        model: the scikit-learn regressor, fitted to all rows.
        left_out: prediction for each row by a fit to the other rows, `[networks]`.
        error: root mean square of `left_out` minus the targets, in the targets' unit.
        tau: Kendall's tau-b between `left_out` and the targets.
    """

    model: Any
    left_out: np.ndarray
    error: float
    tau: float

    def predict(self, features: ArrayLike) -> np.ndarray:
        """Predicted targets of networks, `[networks, features]` to `[networks]`."""
        return np.asarray(self.model.predict(_finite(np.asarray(features, float), "features")))


def fit(features: ArrayLike, targets: ArrayLike, kind: Kind = "linear") -> Predictor:
    """Fits a predictor of a target, such as accuracy, to features such as block scores and costs.

    `linear` is ordinary least squares (of least norm where features repeat each other). `gaussian_process` has a
    squared-exponential kernel with one length per feature and noise; its kernel is fitted to all rows once and fixed
    in the leave-one-out fits. Features and targets are standardised within every fit.

    Args:
        features: `[networks, features]`.
        targets: `[networks]`.
        kind: `linear` or `gaussian_process`.

    Raises:
        ValueError: fewer than 3 networks, unequal counts, NaN, or another kind.

    Reference: Moons et al., Distilling Optimal Neural Networks: Rapid Search in Diverse Spaces, ICCV 2021, section 3.3
        (a linear predictor over block qualities); Trofimov et al., Multi-fidelity NAS with Knowledge Distillation,
        2020 (a Gaussian process). Leave-one-out with a fixed kernel: Rasmussen and Williams, Gaussian Processes for
        Machine Learning, 2006, section 5.4.2.
    """
    check_literals(fit, locals())
    x, y = _finite(np.asarray(features, float), "features"), _finite(np.asarray(targets, float), "targets")
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"`features` must be [networks, features] and `targets` [networks], got {x.shape} and {y.shape}."
        )
    if len(y) < 3:
        raise ValueError(f"`targets` must have at least 3 networks, got {len(y)}.")
    model = _model(kind, x.shape[1])
    with warnings.catch_warnings():
        # A length at the edge of its range is valid: the feature does not matter, or all of it is noise.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
        alone = clone(model)
        if kind == "gaussian_process":
            fitted = model.regressor_[-1].kernel_
            alone.set_params(
                regressor__gaussianprocessregressor__kernel=fitted, regressor__gaussianprocessregressor__optimizer=None
            )
        left_out = np.asarray(cross_val_predict(alone, x, y, cv=LeaveOneOut()))  # type: ignore[arg-type]
    error = float(np.sqrt(np.mean((left_out - y) ** 2)))
    return Predictor(model, left_out, error, kendall(left_out, y))


def _model(kind: Kind, num_features: int) -> Any:
    if kind == "linear":
        regressor: Any = LinearRegression()
    else:
        kernel = ConstantKernel() * RBF([1.0] * num_features, (1e-2, 1e3)) + WhiteKernel(0.1, (1e-6, 10.0))
        regressor = GaussianProcessRegressor(kernel, n_restarts_optimizer=1, random_state=0)
    return TransformedTargetRegressor(make_pipeline(StandardScaler(), regressor), transformer=StandardScaler())


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(
            f"`{name}` must be finite, got {int((~np.isfinite(values)).sum())} values that are not. Remove those rows."
        )
    return values
