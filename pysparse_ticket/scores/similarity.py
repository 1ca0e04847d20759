"""Statistics of feature matrices [samples, features], in float64: linear CKA, the VIP of partial least squares."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(a: Tensor, b: Tensor) -> float:
    """``||Xc' Yc||_F^2 / (||Xc' Xc||_F ||Yc' Yc||_F)``, columns centred (Kornblith et al. 2019, 3): 1 for features that
    are equal up to rotation, scale and shift, 0 for unrelated ones, and 0 by convention where one is constant.

    a [samples, p], b [samples, q]; more dimensions are flattened. ValueError for other sample counts or NaN.
    """
    x, y = (_matrix(t, which) for t, which in ((a, "first"), (b, "second")))
    if len(x) != len(y):
        raise ValueError(f"CKA compares features of the same samples, not of {len(x)} and {len(y)}")
    x, y = x - x.mean(0), y - y.mean(0)
    if max(x.shape[1], y.shape[1]) > len(x):  # tr(XX' YY') = ||X'Y||^2: the smaller of the two products
        x, y = x @ x.T, y @ y.T
        cross, own = (x * y).sum(), x.norm() * y.norm()
    else:
        cross, own = (x.T @ y).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / own) if own > 0 else 0.0


def pls_vip(features: Tensor, labels: Tensor, components: int = 2) -> Tensor:
    """Variable importance in projection of each feature, float64 [p], from a partial least squares regression of the
    one-hot labels on the features, both standardised (sample standard deviation).

    ``VIP_j = sqrt(p sum_k s_k w_jk^2 / sum_k s_k)``, with s_k = |t_k|^2 |q_k|^2 what component k explains of the labels
    (Jordao et al. 2023, 4; Wold et al. 2001). The squares of all p sum to p. Components beyond the rank add nothing.

    features [samples, p], labels [samples] int. ValueError where every sample is of one class or no feature varies.
    """
    if components < 1:
        raise ValueError(f"PLS needs 1 component or more, not {components}")
    x = _matrix(features, "PLS")
    if labels.dim() != 1 or len(labels) != len(x):
        raise ValueError(f"PLS needs one label a sample: {len(x)} samples, labels of shape {list(labels.shape)}")
    classes, index = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("PLS needs samples of two classes or more; pass more batches")
    x = _standardised(x)
    y = _standardised(torch.eye(len(classes), dtype=torch.float64, device=x.device)[index])
    floor = torch.finfo(torch.float64).eps * x.norm() * y.norm()
    shares, weights = [], []
    for _ in range(components):
        u, singular, _ = torch.linalg.svd(x.T @ y, full_matrices=False)
        if singular[0] <= floor:
            break
        w = u[:, 0]
        t = x @ w
        length = t @ t
        q = y.T @ t / length
        x = x - torch.outer(t, x.T @ t / length)  # without t nothing of x sees what t explains of y: y can stay
        shares.append(length * (q @ q))
        weights.append(w.square())
    if not shares:
        raise ValueError("PLS finds no feature that varies with the labels; look for constant activations")
    share = torch.stack(shares)
    return (features[0].numel() * (torch.stack(weights, 1) @ share) / share.sum()).sqrt()


def _matrix(t: Tensor, which: str) -> Tensor:
    if t.dim() == 0 or not t.numel():
        raise ValueError(f"the {which} features are empty")
    if not torch.isfinite(t).all():
        raise ValueError(f"the {which} features hold NaN or infinity; look for it in the weights or the data")
    return t.detach().reshape(len(t), -1).double()


def _standardised(x: Tensor) -> Tensor:
    spread = x.std(0)
    return (x - x.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))
