"""Colour and texture of an image patch in 96 fixed numbers: no learned weights, no randomness.

    names                    n   what
    density_{mean,std,skew}  9   optical density of red, green, blue
    saturation, value        4   mean and standard deviation, HSV
    hue_{cos,sin}            2   mean hue weighted by saturation
    {haematoxylin,eosin}_*  24   stain amount: mean, standard deviation, histogram of 10 bins
    lbp_*                   30   rotation-invariant uniform local binary patterns (8 neighbours):
                                 grey, grey at half size, haematoxylin
    gradient_*              20   grey gradient magnitude: mean, standard deviation, 8 bins; at full
                                 and half size
    contrast_{mean,std}      2   standard deviation of grey within 16 cells
    coherence                1   how much of the gradient has one direction, 0 to 1
    tissue                   1   share of pixels with saturation above 0.05
    grey_*                   3   entropy in bits, 5th and 95th percentile

Sources: Ruifrok and Johnston, Anal Quant Cytol Histol 23, 2001 (stain separation); Ojala et al.,
IEEE TPAMI 24, 2002 (local binary patterns).
"""

from __future__ import annotations

import numpy as np

# optical density of each stain in red, green, blue: haematoxylin, eosin, and what is left (DAB)
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_STAIN_EDGES = np.concatenate([np.linspace(0.0, 0.9, 10), [np.inf]])
_GRADIENT_EDGES = np.concatenate([[0.0], 2.0 ** np.arange(-8, -1), [np.inf]])
# the eight neighbours in circular order
_NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def _names() -> tuple[str, ...]:
    names = [f"density_{kind}_{c}" for kind in ("mean", "std", "skew") for c in "rgb"]
    names += ["saturation_mean", "saturation_std", "value_mean", "value_std"]
    names += ["hue_cos", "hue_sin"]
    for stain in ("haematoxylin", "eosin"):
        names += [f"{stain}_mean", f"{stain}_std", *(f"{stain}_bin{i}" for i in range(10))]
    for channel in ("grey", "grey_half", "haematoxylin"):
        names += [f"lbp_{channel}_{i}" for i in range(10)]
    for scale in ("full", "half"):
        names += [f"gradient_{scale}_mean", f"gradient_{scale}_std"]
        names += [f"gradient_{scale}_bin{i}" for i in range(8)]
    names += ["contrast_mean", "contrast_std", "coherence", "tissue"]
    return (*names, "grey_entropy", "grey_p05", "grey_p95")


FEATURE_NAMES = _names()


def describe_patches(patches: np.ndarray) -> np.ndarray:
    """The 96 numbers of each patch, in the order of `FEATURE_NAMES`.

    Args:
        patches: [B, P, P, 3] uint8 RGB, P at least 8.

    Returns:
        [B, 96] float32, finite.

    Raises:
        ValueError: `patches` has another type or shape.
    """
    if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[3] != 3:
        raise ValueError(
            f"patches is {patches.dtype} of shape {patches.shape}; it must be uint8 [B, P, P, 3]"
        )
    if min(patches.shape[1:3]) < 8:
        raise ValueError(f"patches are {patches.shape[1:3]} pixels; they must be at least 8 by 8")
    image = patches.astype(np.float32)
    density = -np.log10((image + 1.0) / 256.0)
    stains = density @ np.linalg.inv(_normalised(_STAINS)).astype(np.float32)
    grey = image @ _GREY / 255.0
    half = _halved(grey)
    parts = [
        _moments(density),
        _hsv(image / 255.0),
        _stain(stains[..., 0]),
        _stain(stains[..., 1]),
        # whole grey levels: the last bits of a float would decide ties in flat regions
        _patterns(np.rint(grey * 255.0)),
        _patterns(np.rint(half * 255.0)),
        _patterns(np.rint(stains[..., 0] * 255.0)),
        _gradients(grey),
        _gradients(half),
        _structure(grey, image),
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _halved(grey: np.ndarray) -> np.ndarray:
    """Means of 2 by 2 pixels."""
    n, height, width = grey.shape
    even = grey[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4))


def _moments(density: np.ndarray) -> np.ndarray:
    mean = density.mean((1, 2))
    centred = density - mean[:, None, None]
    std = np.sqrt((centred**2).mean((1, 2)))
    # the cube root of the third moment has the unit of the others and is 0 on a flat patch
    skew = np.cbrt((centred**3).mean((1, 2)))
    return np.concatenate([mean, std, skew], axis=1)


def _hsv(image: np.ndarray) -> np.ndarray:
    value = image.max(3)
    chroma = value - image.min(3)
    saturation = chroma / np.maximum(value, 1.0 / 255.0)
    # hue as the angle in the plane across the grey axis
    red, green, blue = np.moveaxis(image, 3, 0)
    angle = np.arctan2(np.sqrt(3.0) * (green - blue), 2.0 * red - green - blue)
    weight = saturation / np.maximum(saturation.sum((1, 2), keepdims=True), 1e-6)
    columns = [
        saturation.mean((1, 2)),
        saturation.std((1, 2)),
        value.mean((1, 2)),
        value.std((1, 2)),
        (weight * np.cos(angle)).sum((1, 2)),
        (weight * np.sin(angle)).sum((1, 2)),
    ]
    return np.stack(columns, axis=1)


def _stain(amount: np.ndarray) -> np.ndarray:
    bins = _histogram(np.maximum(amount, 0.0), _STAIN_EDGES)
    return np.column_stack([amount.mean((1, 2)), amount.std((1, 2)), bins])


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of each sample's values between neighbouring edges."""
    n_bins = len(edges) - 1
    bins = np.searchsorted(edges[1:-1], values.reshape(len(values), -1), side="right")
    return _shares(bins, n_bins)


def _shares(bins: np.ndarray, n_bins: int) -> np.ndarray:
    offsets = np.arange(len(bins))[:, None] * n_bins
    counts = np.bincount((bins + offsets).ravel(), minlength=len(bins) * n_bins)
    return counts.reshape(len(bins), n_bins) / bins.shape[1]


def _patterns(channel: np.ndarray) -> np.ndarray:
    """Shares of the patterns 0 to 8 (ones in a uniform pattern) and 9 (all others)."""
    _, height, width = channel.shape
    centre = channel[:, 1:-1, 1:-1]
    bits = [
        channel[:, 1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx] >= centre
        for dy, dx in _NEIGHBOURS
    ]
    ones = np.zeros(centre.shape, dtype=np.uint8)
    changes = np.zeros(centre.shape, dtype=np.uint8)
    for i, bit in enumerate(bits):
        ones += bit
        changes += bit != bits[i - 1]
    codes = np.where(changes <= 2, ones, 9)
    return _shares(codes.reshape(len(codes), -1).astype(np.int64), 10)


def _slopes(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (
        (grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]) / 2.0,
        (grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]) / 2.0,
    )


def _gradients(grey: np.ndarray) -> np.ndarray:
    magnitude = np.hypot(*_slopes(grey))
    bins = _histogram(magnitude, _GRADIENT_EDGES)
    return np.column_stack([magnitude.mean((1, 2)), magnitude.std((1, 2)), bins])


def _structure(grey: np.ndarray, image: np.ndarray) -> np.ndarray:
    n, height, width = grey.shape
    cells = grey[:, : height // 4 * 4, : width // 4 * 4]
    cells = cells.reshape(n, 4, height // 4, 4, width // 4).std((2, 4)).reshape(n, 16)
    along_x, along_y = _slopes(grey)
    xx, yy = (along_x**2).mean((1, 2)), (along_y**2).mean((1, 2))
    xy = (along_x * along_y).mean((1, 2))
    coherence = np.hypot(xx - yy, 2.0 * xy) / np.maximum(xx + yy, 1e-12)
    high = image.max(3)
    tissue = ((high - image.min(3)) > 0.05 * np.maximum(high, 1.0)).mean((1, 2))
    levels = np.rint(grey * 255.0).astype(np.int64).reshape(n, -1)
    shares = _shares(levels, 256)
    entropy = -(shares * np.log2(np.maximum(shares, 1e-12))).sum(1)
    low, up = np.percentile(levels, [5.0, 95.0], axis=1) / 255.0
    return np.column_stack([cells.mean(1), cells.std(1), coherence, tissue, entropy, low, up])
