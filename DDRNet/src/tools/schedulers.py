"""Learning-rate schedules: the rate of every step of a training."""

import numpy as np


def learning_rates(
    lr_scheduler: str,
    lr: float,
    warmup_lr: float,
    min_lr: float,
    warmup_length: float,
    epochs: int,
    steps: int,
    lr_adjust: int,
    lr_gamma: float,
    images: int = 256,
) -> np.ndarray:
    """The learning rate of every step, float32 (epochs * steps,), `steps` being those of one epoch.

    A linear warm-up from `warmup_lr` to `lr` over `warmup_length` epochs, then

    - constant_lr: `lr`;
    - cosine_lr: half a cosine from `lr` to `min_lr` at the end (arXiv 1608.03983, equation 5, without restarts);
    - multistep_lr: `lr` times `lr_gamma` to the power of floor(epoch / `lr_adjust`), epoch counted from the start;
    - exp_lr: the same without floor, a drop by `lr_gamma` spread over `lr_adjust` epochs.

    The last two stop at `min_lr`. All rates are those of 256 images a step, and grow in proportion to `images`.

    Raises:
        ValueError: another `lr_scheduler`.
    """
    step = np.arange(epochs * steps, dtype=np.float64)
    epoch = step / steps
    warmup = round(warmup_length * steps)
    if lr_scheduler == "constant_lr":
        rates = np.full(len(step), float(lr))
    elif lr_scheduler == "cosine_lr":
        progress = (step - warmup) / max(epochs * steps - warmup, 1)
        rates = min_lr + (lr - min_lr) * (1 + np.cos(np.pi * np.clip(progress, 0, 1))) / 2
    elif lr_scheduler == "multistep_lr":
        rates = np.maximum(lr * lr_gamma ** (epoch // lr_adjust), min_lr)
    elif lr_scheduler == "exp_lr":
        rates = np.maximum(lr * lr_gamma ** (epoch / lr_adjust), min_lr)
    else:
        raise ValueError(f"no schedule {lr_scheduler}")
    rising = step < warmup
    rates[rising] = warmup_lr + (lr - warmup_lr) * step[rising] / max(warmup, 1)
    return (rates * images / 256).astype(np.float32)
