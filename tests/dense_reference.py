"""The distillation loss a second time, from its definition: dense rows, plain loops, float64.

Nothing here comes from the package but the tuples it takes. One position is a handful of vectors
over the vocabulary (V), and every formula is a loop over tokens and one more outcome, the tail.
Slow, and made to be compared with the definition line by line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from logitcache_kernels import DistillSpec, SparseTeacher

FLOOR = 1e-7
NAMES = ("BLENDED", "T1_ONLY", "GOLD_FALLBACK", "SKIP")


@dataclass
class Kept:
    """One teacher at one position: token -> logp, token -> inclusion, and its scalars."""

    logp: dict[int, float]
    inclusion: dict[int, float]
    log_partition: float
    entropy: float

    def certain(self) -> list[int]:
        return [v for v in self.logp if self.inclusion[v] == 1.0]

    def target(self, temperature: float, taboo: set[int]) -> dict[int, float]:
        """p^T of the kept tokens; what certain taboo ones lose is shared among the others."""
        p = {v: math.exp(x / temperature - self.log_partition) for v, x in self.logp.items()}
        lost = sum(p[v] for v in self.certain() if v in taboo)
        return {v: 0.0 if v in taboo else x / max(1.0 - lost, FLOOR) for v, x in p.items()}


@dataclass
class Dense:
    """What ``dense_loss`` gives: the loss, with autograd, and lists with one entry per position."""

    loss: torch.Tensor
    strategy: list[int] = field(default_factory=list)
    js: list[float] = field(default_factory=list)
    kd: list[float] = field(default_factory=list)
    ce: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)


def kept(teacher: SparseTeacher, row: int, vocab_size: int) -> Kept:
    """Read one position of a teacher; padding and ids outside the vocabulary are left out."""
    logp, inclusion = {}, {}
    for k, v in enumerate(teacher.ids_RK[row].tolist()):
        if 0 <= v < vocab_size:
            assert v not in logp
            logp[v] = float(teacher.logp_RK[row, k])
            inclusion[v] = (
                1.0 if teacher.inclusion_RK is None else float(teacher.inclusion_RK[row, k])
            )
    entropy = math.nan if teacher.entropy_R is None else float(teacher.entropy_R[row])
    return Kept(logp, inclusion, float(teacher.log_partition_R[row]), entropy)


def js_bits(first: Kept, second: Kept, vocab_size: int) -> float:
    """Jensen-Shannon divergence in bits of two dense [V + 1] vectors, the tail being the last."""
    dense = []
    for teacher in (first, second):
        p = [0.0] * (vocab_size + 1)
        for v in teacher.certain():
            p[v] = math.exp(teacher.logp[v])
        p[vocab_size] = max(1.0 - sum(p), 0.0)
        dense.append(p)
    total = 0.0
    for a, b in zip(*dense, strict=True):
        m = (a + b) / 2
        total += 0.5 * (a * math.log2(a / m) if a > 0 else 0.0)
        total += 0.5 * (b * math.log2(b / m) if b > 0 else 0.0)
    return min(max(total, 0.0), 1.0)


def confidence(teacher: Kept, kind: str, vocab_size: int) -> float:
    if kind == "top1":
        return max((math.exp(x) for x in teacher.logp.values()), default=0.0)
    return min(max(1.0 - teacher.entropy / math.log(vocab_size), 0.0), 1.0)


def divergence(
    spec: DistillSpec, kind: str, z: torch.Tensor, target: dict[int, float]
) -> torch.Tensor:
    """D(target || softmax(z/T)) of a top-k support, whose tokens are the keys of target."""
    tempered = z / spec.temperature
    lse = torch.logsumexp(tempered, 0)
    p, q, log_q = [], [], []  # outcomes: the support, then perhaps the tail
    for v, x in target.items():
        p.append(x)
        masked = bool(z[v] == -math.inf)
        log_q.append(None if masked else tempered[v] - lse)
        q.append(torch.zeros((), dtype=z.dtype) if masked else log_q[-1].exp())
    if spec.tail == "bucket":
        outside = [v for v in range(len(z)) if v not in target]
        rest = (tempered[outside] - lse).exp().sum()
        p.append(max(1.0 - sum(target.values()), 0.0))
        q.append(rest)
        log_q.append(rest.clamp_min(FLOOR).log())
    elif spec.tail == "renormalise":
        total_p, total_q = max(sum(p), FLOOR), sum(q).clamp_min(FLOOR)
        p = [x / total_p for x in p]
        q = [x / total_q for x in q]
        log_q = [None if x is None else x - total_q.log() for x in log_q]
    total = torch.zeros((), dtype=z.dtype)
    b = spec.jsd_beta
    for x, y, log_y in zip(p, q, log_q, strict=True):
        log_x = math.log(max(x, FLOOR))
        if kind == "forward_kl":
            if x > 0 and log_y is not None:  # a target at a masked token asks in vain: no term
                total = total + x * (log_x - log_y)
        elif kind == "reverse_kl":
            if y > 0:
                total = total + y * (log_y - log_x)
        else:
            log_m = (b * x + (1 - b) * y).clamp_min(FLOOR).log()
            if x > 0:
                total = total + b * x * (log_x - log_m)
            if y > 0:
                total = total + (1 - b) * y * (log_y - log_m)
    return total


def sampled_divergence(
    spec: DistillSpec, z: torch.Tensor, weight: dict[int, float], plain: dict[int, float]
) -> torch.Tensor:
    """sum q (log target - log softmax(z/T)) over the sampled tokens: estimates forward KL."""
    log_q = torch.log_softmax(z / spec.temperature, 0)
    total = torch.zeros((), dtype=z.dtype)
    for v, x in weight.items():
        if x > 0 and z[v] != -math.inf:
            total = total + x * (math.log(max(plain[v], FLOOR)) - log_q[v])
    return total


def mixture(
    parts: list[tuple[float, Kept]], temperature: float, taboo: set[int]
) -> tuple[dict[int, float], dict[int, float]]:
    """Blend targets: token -> share divided by inclusion, token -> share."""
    weight: dict[int, float] = {}
    plain: dict[int, float] = {}
    for share, teacher in parts:
        for v, x in teacher.target(temperature, taboo).items():
            plain[v] = plain.get(v, 0.0) + share * x
            weight[v] = weight.get(v, 0.0) + share * x / teacher.inclusion[v]
    return weight, plain


def dense_loss(
    logits_RV: torch.Tensor,
    teachers: tuple[SparseTeacher, ...],
    labels: list[int],
    spec: DistillSpec,
    *,
    gold: list[bool] | None = None,
    taboo: list[set[int]] | None = None,
    num_items: float | None = None,
) -> Dense:
    """The loss of ``distill_loss`` by its definition; taboo is one set of ids per position."""
    num_rows, vocab_size = logits_RV.shape
    sampled = teachers[0].inclusion_RK is not None
    out = Dense(torch.zeros((), dtype=logits_RV.dtype))
    for r in range(num_rows):
        z, y = logits_RV[r], labels[r]
        forbidden = set() if taboo is None else {v for v in taboo[r] if 0 <= v < vocab_size}
        has_gold = y != -100 and y not in forbidden and (gold is None or gold[r])
        both = [kept(t, r, vocab_size) for t in teachers]

        js, share = 0.0, 1.0
        if y == -100:
            strategy = "SKIP"
        elif len(both) == 1:
            strategy = "T1_ONLY"
        else:
            js = js_bits(*both, vocab_size)
            conf = [confidence(t, spec.confidence, vocab_size) for t in both]
            if js < spec.js_threshold:
                strategy = "BLENDED"
                share = conf[0] / sum(conf) if sum(conf) > 0 else 0.5
            elif conf[0] > spec.confidence_threshold:
                strategy = "T1_ONLY"
            else:
                strategy = "GOLD_FALLBACK" if has_gold else "SKIP"
        w = {"GOLD_FALLBACK": spec.gold_weight, "SKIP": 0.0}.get(strategy, 1.0)

        kd = ce = agreement = torch.zeros((), dtype=z.dtype)
        if spec.taboo == "neutral" and forbidden:
            mask = torch.tensor([v in forbidden for v in range(vocab_size)])
            z = torch.where(mask, -torch.inf, z)
        if strategy != "SKIP" and not bool((z == -torch.inf).all()):
            if has_gold and z[y] != -math.inf:
                ce = torch.logsumexp(z, 0) - z[y]
            parts = [(share, both[0])]
            if strategy == "BLENDED":
                parts.append((1.0 - share, both[1]))
            if strategy == "GOLD_FALLBACK":
                kd = ce
            else:
                kd = spec.temperature**2 * _distance(
                    spec, spec.divergence, z, parts, forbidden, sampled
                )
            if strategy == "BLENDED":
                only = _distance(spec, "forward_kl", z, [(1.0, both[0])], forbidden, sampled)
                agreement = (1.0 - js) * only
        out.loss = out.loss + w * (spec.alpha * ce + spec.beta * kd + spec.gamma * agreement)
        out.strategy.append(NAMES.index(strategy))
        for column, value in ((out.js, js), (out.kd, kd), (out.ce, ce), (out.weight, w)):
            column.append(value.item() if isinstance(value, torch.Tensor) else value)
    if num_items is None:
        num_items = max(sum(y != -100 for y in labels), 1)
    out.loss = out.loss / num_items
    return out


def _distance(
    spec: DistillSpec,
    kind: str,
    z: torch.Tensor,
    parts: list[tuple[float, Kept]],
    forbidden: set[int],
    sampled: bool,
) -> torch.Tensor:
    weight, plain = mixture(parts, spec.temperature, forbidden)
    if sampled:
        return sampled_divergence(spec, z, weight, plain)
    # Taboo tokens are outcomes of their own with target 0, never part of the tail.
    return divergence(spec, kind, z, {**dict.fromkeys(sorted(forbidden), 0.0), **weight})


def sparse(
    logp_RV: torch.Tensor,
    supports: list[list[int]],
    temperature: float,
    inclusion_RV: torch.Tensor | None = None,
    junk: bool = True,
) -> SparseTeacher:
    """Keep the given tokens of dense log-probabilities; F and entropy are those of the whole.

    junk adds columns with padding in the middle and ids outside the vocabulary.
    """
    vocab_size = logp_RV.shape[1]
    width = max(len(s) for s in supports)
    ids, logp, inclusion = [], [], []
    for r, support in enumerate(supports):
        pad = width - len(support)
        row = [*support[:1], *([-1, vocab_size, vocab_size + 7] if junk else []), *support[1:]]
        row += [-1] * pad
        inside = [0 <= v < vocab_size for v in row]
        # A finite logp at an id outside the vocabulary must not matter either.
        outside = [-1.0 if v >= vocab_size else -math.inf for v in row]
        logp.append(
            [
                float(logp_RV[r, v]) if ok else x
                for v, ok, x in zip(row, inside, outside, strict=True)
            ]
        )
        ids.append(row)
        if inclusion_RV is not None:
            inclusion.append(
                [
                    float(inclusion_RV[r, v]) if ok else 0.0
                    for v, ok in zip(row, inside, strict=True)
                ]
            )
    p_RV = logp_RV.exp()
    return SparseTeacher(
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(logp, dtype=torch.float64),
        (logp_RV / temperature).logsumexp(-1),
        -torch.where(p_RV > 0, p_RV * logp_RV, 0.0).sum(-1),
        torch.tensor(inclusion, dtype=torch.float64) if inclusion_RV is not None else None,
    )


@dataclass
class Batch:
    """Positions of every kind: teachers that agree, disagree, are one-hot; ignored labels."""

    logits_RV: torch.Tensor
    teachers: tuple[SparseTeacher, SparseTeacher]
    labels: list[int]
    gold: list[bool]


def make_batch(
    seed: int,
    temperature: float,
    *,
    vocab_size: int = 13,
    kinds: tuple[int, int] = (5, 7),
    support: str = "topk",
    sampled: bool = False,
    repeats: int = 2,
    student_masks: bool = True,
) -> Batch:
    """Draw a batch in which all four strategies occur (with supports "topk"; sizes are in kinds).

    support: "topk", "random", or "disjoint" (even ids for teacher 1, odd ids for teacher 2).
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows1, rows2, gold, labels = [], [], [], []
    for i in range(7 * repeats):
        kind, a = i % 7, i % vocab_size
        b = (a + 5) % vocab_size
        first = 1.5 * normal(vocab_size)
        second = first + 0.1 * normal(vocab_size)  # kind 0: they agree
        if kind in (1, 2, 3):  # disagreement: teacher 1 sure (1) or not (2 with gold, 3 without)
            first, second = 0.3 * normal(vocab_size), 0.3 * normal(vocab_size)
            first[a] += 6.0 if kind == 1 else 2.6
            second[b] += 5.0
        if kind in (4, 5):  # one-hot teachers, the same token or two
            first, second = torch.full((2, vocab_size), -torch.inf, dtype=torch.float64)
            first[a] = 0.0
            second[a if kind == 4 else b] = 0.0
        rows1.append(first)
        rows2.append(second)
        gold.append(kind in (0, 1, 2))
        labels.append(-100 if kind == 6 else (3 * i + 1) % vocab_size)
    dense = tuple(torch.log_softmax(torch.stack(rows), -1) for rows in (rows1, rows2))

    teachers = []
    for number, (logp_RV, size) in enumerate(zip(dense, kinds, strict=True)):
        supports = []
        for r in range(len(labels)):
            if support == "topk":
                ids = logp_RV[r].topk(size).indices.tolist()
            else:
                pool = (
                    list(range(vocab_size))
                    if support == "random"
                    else list(range(number, vocab_size, 2))
                )
                order = torch.randperm(len(pool), generator=g).tolist()
                ids = [pool[k] for k in order[: size - r % 3]]
            supports.append(ids)
        inclusion = None
        if sampled:
            draw = 0.05 + 0.9 * torch.rand(logp_RV.shape, generator=g, dtype=torch.float64)
            inclusion = torch.where(logp_RV.exp() > 0.1, 1.0, draw)
        teachers.append(sparse(logp_RV, supports, temperature, inclusion))
    logits_RV = 2.0 * normal(len(labels), vocab_size)
    if student_masks:
        for r in range(0, len(labels), 2):  # masked tokens: one in the support, one anywhere
            logits_RV[r, int(teachers[0].ids_RK[r, -1].clamp(0, vocab_size - 1))] = -torch.inf
            logits_RV[r, (labels[r] + 3) % vocab_size] = -torch.inf
    return Batch(logits_RV, (teachers[0], teachers[1]), labels, gold)
