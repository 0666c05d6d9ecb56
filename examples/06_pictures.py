# %% [markdown]
# # What quantization does to feature maps, and what distillation does about it
#
# Run it as a script, `python examples/06_pictures.py FOLDER`, or cell by cell in an editor that knows `# %%`. It writes
# three pictures into FOLDER. A minute on a CPU; numpy and Pillow draw, so that nothing else need be installed.

# %%
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import faqd

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
digits = load_digits()
images = (torch.from_numpy(digits.images).float()[:, None] / 16 * 255).round() / 255
labels = torch.from_numpy(digits.target)

# %% [markdown]
# A teacher, trained with labels on the first 1,400 digits.

# %%
teacher = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
    *(nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
)
optimizer = torch.optim.Adam(teacher.parameters(), 0.003)
for _ in range(500):
    batch = torch.randint(1400, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(teacher(images[batch]), labels[batch]).backward()
    optimizer.step()
teacher.eval()


# %% [markdown]
# The map behind the second ReLU, by which the pictures are drawn: of the float network, of its 2/2 student untrained,
# and of the same student distilled without a label.


# %%
def map_of(network: nn.Module, place: str, x: Tensor) -> Tensor:
    """What the module at `place` returns for x."""
    kept: list[Tensor] = []
    hook = network.get_submodule(place).register_forward_hook(lambda module, read, made: kept.append(made.detach()))
    with torch.no_grad():
        network.eval()(x)
    hook.remove()
    return kept[0]


def student_map(student: faqd.Student, x: Tensor) -> Tensor:
    return map_of(student.network, "3_quant", x)


student = faqd.prepare(teacher, images[:2], faqd.QuantConfig(weights=2, activations=2))
faqd.calibrate(student, images[:1400])
shown = images[1400:1404]
wanted, untrained = map_of(teacher, "3", shown), student_map(student, shown)

loss = faqd.DistillationLoss(teacher, student)
optimizer = torch.optim.Adam(student.parameters(), 1e-3)
student.train()
affinity = []
for _ in range(300):
    optimizer.zero_grad()
    loss(images[torch.randint(1400, (64,))]).backward()
    optimizer.step()
    affinity.append(loss.terms["affinity"])
distilled = student_map(student, shown)


# %% [markdown]
# **maps.png**: for each digit a row of sixteen channels of the teacher, below it those of the student untrained, and
# distilled. Each channel has one grey scale for all three.


# %%
def grey(values: Tensor, low: Tensor, high: Tensor) -> NDArray[np.uint8]:
    return ((values - low) / (high - low).clamp_min(1e-6) * 255).clamp(0, 255).byte().numpy()


def save(name: str, pixels: NDArray[np.uint8], scale: int) -> None:
    Image.fromarray(np.kron(pixels, np.ones((scale, scale), np.uint8))).save(folder / name)


def tiles(rows: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Rows of maps (channels, H, W), with white between them."""
    framed = [np.concatenate([np.pad(m, 1, constant_values=255) for m in row], axis=1) for row in rows]
    return np.concatenate(framed)


together = torch.cat([wanted, untrained, distilled])
low, high = (getattr(together, name)(dim=(0, 2, 3), keepdim=True)[0] for name in ("amin", "amax"))
rows = [grey(each[i], low, high)[:16] for i in range(len(shown)) for each in (wanted, untrained, distilled)]
save("maps.png", tiles(rows), 4)


# %% [markdown]
# **affinity.png**: what the feature affinity compares. Pixel against pixel, the cosine of their channels: 64 x 64
# numbers for a digit. Teacher, untrained, distilled; white is 1.


# %%
def cosines(feature_map: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) -> (HW, HW), grey."""
    pixels = nn.functional.normalize(feature_map.flatten(1), dim=0)
    return grey(pixels.T @ pixels, torch.tensor(0.0), torch.tensor(1.0))


rows = [np.stack([cosines(each[i]) for each in (wanted, untrained, distilled)]) for i in range(len(shown))]
save("affinity.png", tiles(rows), 3)

# %% [markdown]
# **loss.png**: the affinity term over the iterations, its logarithm upwards.

# %%
curve = np.log10(np.asarray(affinity))
height = ((curve - curve.min()) / np.ptp(curve) * 99).round().astype(int)
pixels = np.full((100, len(curve)), 255, np.uint8)
pixels[99 - height, np.arange(len(curve))] = 0
save("loss.png", pixels, 3)


# %%
def apart(found: Tensor) -> float:
    """By how much the cosines differ from the teacher's, on average."""
    pairs = zip(found, wanted, strict=True)
    return float(np.mean([np.abs(cosines(a).astype(int) - cosines(b)).mean() / 255 for a, b in pairs]))


print(f"cosines off by: untrained {apart(untrained):.3f}, distilled {apart(distilled):.3f}")
print("pictures:", ", ".join(sorted(path.name for path in folder.glob("*.png"))))
