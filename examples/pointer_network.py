"""A pointer network that sorts numbers and finds convex hulls, with FAVOR+ as its pointer.

Such a network answers a set of inputs with a sequence of these inputs. In each step it points to
one of them: the weights of its attention are the answer, not a step on the way to it. Here they are

    p_i(j) = φ(q_i)·φ(k_j) / Σ_j' φ(q_i)·φ(k_j'),

a row of the matrix that FAVOR+ implies. q_i is the state of a decoder that has read what was
pointed to before, k_j is input j after a layer of FAVOR+ attention, and a key of its own means
that the answer is complete. A step costs O(number of inputs), and keeps no matrix.

Inputs are points in the unit square. Sorting goes by the first coordinate. A hull is told
counterclockwise from its lowest point on. "All right" counts answers without any error on held-out
inputs. The greedy answers need no training: for sorting, from the first input on always to the
nearest one that was not named; for hulls, as many points as hulls have most often, those farthest
from the center, in the order of their angles.

Source: Vinyals et al. 2015, "Pointer Networks"; Choromanski et al. 2021, Section 6.

Measured in 164 s of CPU time on AMD EPYC, 1 thread(s), torch 2.13.0+cpu:

    sorting, all right: 69.0% (untrained 0.0%, greedy 15.9%)
    hulls, all right: 51.3% (untrained 0.0%, greedy 39.2%)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers import FavorAttention, KernelFeatures, SoftmaxFeatures, favor_attention


@dataclass(frozen=True)
class Settings:
    num_points: int = 6
    width: int = 64
    num_projections: int = 64
    steps: int = 2000
    batch: int = 32
    held_out: int = 1000


FULL = Settings()
SMALL = Settings(num_points=4, width=32, num_projections=32, steps=10, batch=32, held_out=50)


def sorting(points: Tensor) -> Tensor:
    """The numbers of the points, (batch, number), by their first coordinate."""
    return points[..., 0].argsort(dim=1)


def hull(points: Tensor) -> Tensor:
    """The numbers of the points on the hull, (batch, number); what is left over is `number`.

    j follows i if all points are to the left of the way from i to j. Cost: O(number³).
    """
    number = points.shape[1]
    x, y = (points[:, None] - points[:, :, None]).unbind(-1)  # from i (row) to j (column)
    turn = x[..., :, None] * y[..., None, :] - y[..., :, None] * x[..., None, :]
    is_next = (turn >= 0).all(dim=-1) & ~torch.eye(number, dtype=torch.bool)
    following = is_next.int().argmax(dim=2)
    walk = [points[..., 1].argmin(dim=1, keepdim=True)]
    for _ in range(number - 1):
        walk.append(following.gather(1, walk[-1]))
    order = torch.cat(walk, dim=1)
    is_over = (order == order[:, :1]).cumsum(dim=1) > 1
    return order.masked_fill(is_over, number)


def greedy_sorting(points: Tensor) -> Tensor:
    """From the first point on always to the nearest one, by the first coordinate, that is left."""
    distance = (points[:, None, :, 0] - points[:, :, None, 0]).abs()
    at = torch.zeros(len(points), 1, dtype=torch.long)
    order = [at]
    for _ in range(points.shape[1] - 1):
        distance = distance.scatter(2, at[:, None].expand(-1, points.shape[1], -1), torch.inf)
        at = distance.take_along_dim(at[:, None], dim=1).argmin(dim=2)
        order.append(at)
    return torch.cat(order, dim=1)


def greedy_hull(points: Tensor) -> Tensor:
    """As many points as hulls have most often, those farthest from the mean, by their angles."""
    number = points.shape[1]
    size = int((hull(points) < number).sum(dim=1).mode().values)
    x, y = (points - points.mean(dim=1, keepdim=True)).unbind(-1)
    chosen = x.hypot(y).topk(size).indices
    lowest = points[..., 1].gather(1, chosen).argmin(dim=1, keepdim=True)
    angle = torch.atan2(y, x).gather(1, chosen)
    # Counterclockwise from the lowest one.
    turn = (angle - angle.gather(1, lowest)).remainder(2 * torch.pi)
    return F.pad(chosen.gather(1, turn.argsort(dim=1)), (0, number - size), value=number)


class PointerNetwork(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.embed = nn.Linear(2, width)
        self.encoder = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder.self_attn = FavorAttention(
            width, 2, batch_first=True, feature_map=KernelFeatures(width // 2, 64)
        )
        self.begin = nn.Parameter(torch.randn(width))
        self.end = nn.Parameter(torch.randn(width))
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.to_query = nn.Linear(width, width)
        self.to_key = nn.Linear(width, width)
        self.phi = SoftmaxFeatures(width, settings.num_projections)

    def encode(self, points: Tensor) -> Tensor:
        """(batch, number + 1, width): the inputs, and the end."""
        encoded = self.encoder(self.embed(points))
        return torch.cat([encoded, self.end.expand(len(points), 1, -1)], dim=1)

    def point(self, state: Tensor, encoded: Tensor) -> Tensor:
        """Probabilities (batch, steps, number + 1) of what each state points to."""
        query, key = self.to_query(state)[:, None], self.to_key(encoded)[:, None]
        # One-hot values read the weights out. This backend is the faster one for short sequences.
        one_hot = torch.eye(key.shape[2]).expand(len(key), 1, -1, -1)
        return favor_attention(query, key, one_hot, self.phi, backend="chunked")[:, 0]

    def forward(self, points: Tensor, answer: Tensor) -> Tensor:
        """The probabilities of each step, after the right answers of the steps before."""
        encoded = self.encode(points)
        before = encoded.take_along_dim(answer[:, :-1, None], dim=1)
        begin = self.begin.expand(len(points), 1, -1)
        state, _ = self.decoder(torch.cat([begin, before], dim=1), self.summary(encoded))
        return self.point(state, encoded)

    @torch.no_grad()
    def answer(self, points: Tensor) -> Tensor:
        """What it points to, (batch, number), each step after its own answers before."""
        encoded = self.encode(points)
        memory, read, order = self.summary(encoded), self.begin.expand(len(points), 1, -1), []
        for _ in range(points.shape[1]):
            state, memory = self.decoder(read, memory)
            order.append(self.point(state, encoded).argmax(dim=2))
            read = encoded.take_along_dim(order[-1][..., None], dim=1)
        return torch.cat(order, dim=1)

    @staticmethod
    def summary(encoded: Tensor) -> Tensor:
        return encoded.mean(dim=1)[None]


TASKS = {"sorting": (sorting, greedy_sorting), "hulls": (hull, greedy_hull)}


def train(settings: Settings, task: Callable[[Tensor], Tensor], model: PointerNetwork) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, settings.steps)
    for _ in range(settings.steps):
        points = torch.rand(settings.batch, settings.num_points, 2)
        answer = task(points)
        probability = model(points, answer).gather(2, answer[..., None])
        loss = -(probability + 1e-9).log().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def run(settings: Settings) -> dict[str, str]:
    figures = {}
    for name, (task, greedy) in TASKS.items():
        torch.manual_seed(0)
        points = torch.rand(settings.held_out, settings.num_points, 2)
        right = task(points)

        def all_right(answer: Tensor, right: Tensor = right) -> str:
            return f"{(answer == right).all(dim=1).float().mean():.1%}"

        model = PointerNetwork(settings)
        untrained = all_right(model.answer(points))
        train(settings, task, model)
        figures[f"{name}, all right"] = (
            f"{all_right(model.answer(points))} (untrained {untrained}, "
            f"greedy {all_right(greedy(points))})"
        )
    return figures


if __name__ == "__main__":
    from measured import command

    command(__file__, run, FULL, SMALL)
