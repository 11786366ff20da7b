"""Eager capture and the log-partition: supports, statistics, randomness, real logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache_kernels import TEMPERATURES, Capture, capture, log_partition, spline_weights

DATA = Path(__file__).parent / "data"
NAN, INF = math.nan, math.inf


def random_logits(num_rows: int = 6, vocab_size: int = 40, seed: int = 0, spread: float = 2.0):
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num_rows, vocab_size, generator=g, dtype=torch.float64)


@pytest.fixture(scope="module")
def real_logits():
    """Logits of two real teachers, 2 x 6 x 151936, and the tokens that follow."""
    with np.load(DATA / "real_logits.npz") as arrays:
        logits = [torch.from_numpy(arrays[name]).float() for name in ("teacher1", "teacher2")]
        labels = torch.from_numpy(arrays["labels"]).long()
    return logits, labels


def support(kept: Capture, row: int) -> list[int]:
    return [v for v in kept.ids_RK[row].tolist() if v >= 0]


def tokens(kept: Capture, row: int, certain: bool) -> set[int]:
    pairs = zip(kept.ids_RK[row].tolist(), kept.inclusion_RK[row].tolist(), strict=True)
    return {v for v, inclusion in pairs if v >= 0 and (inclusion == 1.0) == certain}


# --- which entries are kept --------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["sampled", "topk", "full"])
def test_support_is_sorted_by_logp_and_padded_at_its_end(estimator):
    logits = random_logits()
    logits[0, 10:20] = 1.0  # ties
    kept = capture(logits, estimator=estimator, top_k=12, min_prob=0.01, threshold=0.2)
    logp = torch.log_softmax(logits, -1)
    assert kept.ids_RK.dtype == torch.int32
    for r in range(len(logits)):
        ids = support(kept, r)
        assert len(ids) == len(set(ids)) == int(kept.count_R[r]) >= 1
        assert kept.ids_RK[r].tolist() == ids + [-1] * (kept.ids_RK.shape[1] - len(ids))
        assert ids == sorted(ids, key=lambda v: (-float(logp[r, v]), v))
        torch.testing.assert_close(kept.logp_RK[r, : len(ids)], logp[r, ids])
        assert (kept.logp_RK[r, len(ids) :] == -INF).all()
        assert (kept.inclusion_RK[r, len(ids) :] == 0).all()
        assert (kept.inclusion_RK[r, : len(ids)] > 0).all()


@pytest.mark.parametrize(
    ("top_k", "min_prob"), [(1, 0.0), (7, 0.0), (7, 0.03), (40, 0.01), (200, 0.0)]
)
def test_topk_keeps_the_largest_above_min_prob(top_k, min_prob):
    logits = random_logits(8)
    logits[3] = 0.5  # all equal: every p is 1/40
    logits[4, 7:30] = 4.0
    kept = capture(logits, estimator="topk", top_k=top_k, min_prob=min_prob)
    assert kept.ids_RK.shape == (8, min(top_k, 40))
    p = torch.softmax(logits, -1)
    for r in range(8):
        order = sorted(range(40), key=lambda v: (-float(logits[r, v]), v))[:top_k]
        assert support(kept, r) == [v for i, v in enumerate(order) if i == 0 or p[r, v] >= min_prob]
    assert (kept.inclusion_RK[kept.ids_RK >= 0] == 1).all()


def test_topk_and_sampled_keep_at_least_one_entry_the_lowest_id_among_equals():
    logits = torch.zeros(2, 1000)
    logits[1, [400, 300]] = 1.0
    for options in ({"estimator": "topk", "min_prob": 0.5}, {"min_prob": 1.0, "threshold": 1.0}):
        kept = capture(logits, **options)
        assert kept.ids_RK[:, 0].tolist() == [0, 300]
        assert [tokens(kept, r, certain=True) for r in range(2)] == [{0}, {300}]
    assert capture(logits, estimator="topk", min_prob=0.5).count_R.tolist() == [1, 1]


def test_full_keeps_everything():
    logits = random_logits()
    logits[0, 3] = -INF
    kept = capture(logits, estimator="full")
    for r in range(len(logits)):
        assert sorted(support(kept, r)) == list(range(40))
    assert (kept.tail_log_partition_RT == -INF).all()
    assert (kept.inclusion_RK == 1).all()


@pytest.mark.parametrize(
    ("min_prob", "threshold", "sample_temperature"),
    [(0.005, 0.05, 2.0), (0.05, 0.2, 2.0), (0.2, 0.05, 1.0), (0.1, 0.1, 1.0), (0.3, 0.3, 3.0)],
)
def test_certain_entries_of_a_sample_are_those_of_the_rule(min_prob, threshold, sample_temperature):
    logits = random_logits(20, seed=1)
    kept = capture(
        logits, min_prob=min_prob, threshold=threshold, sample_temperature=sample_temperature
    )
    for r in range(20):
        p = torch.softmax(logits[r], -1).tolist()
        soft = torch.softmax(logits[r] / sample_temperature, -1).tolist()
        rule = {v for v in range(40) if p[v] >= min_prob or max(p[v], soft[v]) >= threshold}
        rule.add(max(range(40), key=lambda v: (p[v], -v)))
        assert tokens(kept, r, certain=True) == rule
        for v, inclusion in zip(
            kept.ids_RK[r].tolist(), kept.inclusion_RK[r].tolist(), strict=True
        ):
            if v >= 0 and v not in rule:
                assert inclusion == pytest.approx(max(p[v], soft[v]) / threshold, rel=1e-12)


def test_certain_entries_and_tail_are_one_whole_within_a_rounding_of_the_threshold():
    # Two of three tokens lie at the threshold, give or take a step of float32: an inclusion just
    # below 1 must not be rounded to 1, which would count its token both as certain and in the tail.
    logits = torch.tensor([[2.0, 1.0, 1.0]]).expand(8, -1)
    r = float(torch.softmax(logits[0], -1)[1])
    options = {"min_prob": 1.0, "sample_temperature": 1.0, "temperatures": (1.0,)}
    sizes = set()
    for step in range(-4, 5):
        kept = capture(logits, threshold=r * (1 + step * 2**-24), **options)
        certain = torch.where(kept.inclusion_RK == 1, kept.logp_RK.exp(), 0.0).sum(-1)
        whole = certain + kept.tail_log_partition_RT[:, 0].exp()
        torch.testing.assert_close(whole, torch.ones(8))
        sizes |= {len(tokens(kept, row, certain=True)) for row in range(8)}
    assert sizes == {1, 3}


# --- randomness --------------------------------------------------------------------------------


def test_entries_are_kept_as_often_as_their_inclusion_says_and_independently():
    num_draws = 20_000
    logits = random_logits(1, 24, seed=2, spread=1.0)
    kept = capture(logits.expand(num_draws, -1), min_prob=0.2, threshold=0.15, seed=3)
    p, soft = torch.softmax(logits[0], -1), torch.softmax(logits[0] / 2, -1)
    inclusion = (torch.maximum(p, soft) / 0.15).clamp_max(1.0)
    inclusion[(p >= 0.2) | (p == p.max())] = 1.0
    drawn = torch.zeros(num_draws, 25).scatter_(1, kept.ids_RK.long() % 25, 1.0)[:, :24].double()
    chance = inclusion < 1
    assert chance.sum() > 10
    assert (drawn[:, ~chance] == 1).all()
    error = (drawn.mean(0) - inclusion)[chance]
    bound = (inclusion * (1 - inclusion) / num_draws).sqrt()[chance]
    assert (error.abs() < 4.5 * bound).all()
    correlation = torch.corrcoef(drawn[:, chance].T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(num_draws)
    # Nor does one position tell anything about the next.
    centred = (drawn - drawn.mean(0))[:, chance]
    serial = (centred[1:] * centred[:-1]).mean(0) / centred.var(0)
    assert serial.abs().max() < 5 / math.sqrt(num_draws)


def equal(a: Capture, b: Capture) -> bool:
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


def rows(kept: Capture, index) -> Capture:
    return Capture(*(x[index] for x in kept))


def test_randomness_is_a_function_of_seed_and_position_whatever_the_batch():
    logits = random_logits(12, 300, seed=4).float()
    positions = torch.tensor([5, 0, 2**40 + 3, 17, 2**31, 9, 3, 2**32 + 5, 1, 4, 2, 8])
    options = {"min_prob": 0.05, "threshold": 0.3, "seed": 11}
    whole = capture(logits, position_ids_R=positions, **options)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    turned = capture(logits[order], position_ids_R=positions[order], **options)
    assert equal(turned, rows(whole, order))
    for r in range(12):
        one = capture(logits[r : r + 1], position_ids_R=positions[r : r + 1], **options)
        assert equal(one, rows(whole, slice(r, r + 1)))
    # The columns beyond num_tokens, and the global generator, have no say either.
    torch.manual_seed(99)
    wide = torch.cat((logits, torch.zeros(12, 5)), -1)
    assert equal(capture(wide, num_tokens=300, position_ids_R=positions, **options), whole)


def test_seeds_and_positions_draw_differently():
    logits = random_logits(1, 300, seed=5).expand(4, -1)
    options = {"min_prob": 0.05, "threshold": 0.3}
    base = capture(logits, seed=0, **options)
    supports = {tuple(sorted(support(base, r))) for r in range(4)}
    assert len(supports) == 4
    for seed in (1, 2**32, -1, 2**63 - 1):
        other = capture(logits, seed=seed, **options)
        assert not torch.equal(other.ids_RK, base.ids_RK)
    assert equal(capture(logits, position_ids_R=torch.arange(4), **options), base)


def uniforms(seed: int, position: int, num_tokens: int) -> np.ndarray:
    """The uniform numbers of one position as integers of 32 bits, written with numpy alone."""

    def mix(x):
        x = np.asarray(x, dtype=np.uint64) & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    low, high = (np.uint64(part) for part in (position & 0xFFFFFFFF, position >> 32))
    start = mix((seed & 0xFFFFFFFF) ^ 0x9E3779B9) ^ np.uint64(seed >> 32)
    key0 = mix(mix(mix(start) ^ low) ^ high)
    key1 = mix(key0 ^ low ^ np.uint64(0x2545F491))
    ids = np.arange(num_tokens, dtype=np.uint64)
    group, member = ids // 4096 * 128 + ids // 8 % 128, ids // 1024 % 4 * 8 + ids % 8
    fall = 1 - (mix(key0 + group * 0x9E3779B9) + 0.5) / 2**32
    for _ in range(5):
        fall = np.sqrt(fall)
    least = ((1 - fall) * 2**32).astype(np.uint64)
    holder = mix(key1 - (group + 1) * 0x85EBCA6B) >> 27
    above = ((2**32 - 1 - least) * (mix(key1 + ids * 0x85EBCA6B) >> 1)) >> 31
    return np.where(member == holder, least, least + 1 + above)


def test_uniform_numbers_are_uniform_and_independent_within_and_across_groups():
    # 786432 numbers of 64 positions; each statistic is off by less than 4.5 of its deviations.
    number = np.stack([uniforms(2**35 + 7, position, 3 * 4096) for position in range(64)])
    share = (number + 0.5) / 2**32

    def assert_level(counts):
        """Counts that should be equal but for chance."""
        expected = counts.sum() / len(counts)
        freedom = len(counts) - 1
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert abs(statistic - freedom) < 4.5 * math.sqrt(2 * freedom)

    for part in (number >> 24, number & 255, number // 2**12 & 255):
        assert_level(np.bincount(part.astype(np.int64).ravel(), minlength=256))
    for bound in (0.3, 0.05, 0.002):  # as inclusions: overall, and for each member of a group
        hit = (share < bound).reshape(64, 3, 4, 128, 8)
        spread = math.sqrt(share.size * bound * (1 - bound))
        assert abs(hit.sum() - share.size * bound) < 4.5 * spread
        assert_level(hit.sum((0, 1, 3)).ravel())
        # How many of a group's 32 are drawn together is binomial.
        drawn = np.bincount(hit.sum((2, 4)).ravel(), minlength=33)
        chance = [math.comb(32, k) * bound**k * (1 - bound) ** (32 - k) for k in range(33)]
        expected = np.array(chance) * drawn.sum()
        usual = expected > 10
        statistic = ((drawn - expected) ** 2 / expected)[usual].sum()
        assert statistic - usual.sum() < 4.5 * math.sqrt(2 * usual.sum())
    centred = (share - 0.5) * math.sqrt(12)
    for distance in (
        1,
        8,
        1024,
        4096,
    ):  # a member beside, the next group, the next run, the next tile
        serial = (centred[:, distance:] * centred[:, :-distance]).ravel()
        assert abs(serial.mean()) < 4.5 / math.sqrt(len(serial))
    across = (centred[1:] * centred[:-1]).ravel()
    assert abs(across.mean()) < 4.5 / math.sqrt(len(across))


def test_entries_are_kept_where_their_uniform_is_below_their_inclusion():
    vocab_size, threshold, seed = 150_000, 2e-5, 2**33 + 5
    positions = [0, 1, 77, 2**32 - 1, 2**32, 2**40 + 9, 12345, 678]
    options = {"seed": seed, "position_ids_R": torch.tensor(positions)}
    logits = torch.zeros(8, vocab_size, dtype=torch.float64)
    kept = capture(logits, min_prob=1.0, threshold=threshold, **options)
    bound = 2**32 / vocab_size / threshold
    for r, position in enumerate(positions):
        keep = uniforms(seed, position, vocab_size) + 0.5 < bound
        keep[0] = True  # the largest, lowest id
        assert int(kept.count_R[r]) == keep.sum()
        assert support(kept, r) == np.flatnonzero(keep)[:256].tolist()


def test_draws_are_the_ones_of_the_first_version():
    """Stores are rebuilt byte for byte, so the stream of uniforms may never change."""
    logits = torch.zeros(3, 64)
    kept = capture(
        logits, min_prob=1.0, threshold=0.25, seed=1234, position_ids_R=torch.tensor([0, 7, 2**35])
    )
    assert [support(kept, r) for r in range(3)] == [
        [0, 31, 37, 38, 41],
        [0, 4, 19, 49],
        [0, 53, 60],
    ]


# --- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["sampled", "topk", "full"])
def test_statistics_are_those_of_the_whole_distribution(estimator):
    logits = random_logits()
    logits[2, 5] = -INF
    labels = torch.tensor([0, 39, 5, -100, 12, 5])
    labels[2] = 5
    kept = capture(
        logits, estimator=estimator, labels_R=labels, min_prob=0.05, threshold=0.3, top_k=9
    )
    p = torch.softmax(logits, -1)
    for r in range(6):
        entropy = -sum(x * math.log(x) for x in p[r].tolist() if x > 0)
        assert float(kept.entropy_R[r]) == pytest.approx(entropy, rel=1e-12)
        assert float(kept.top1_logp_R[r]) == pytest.approx(math.log(p[r].max()), rel=1e-12)
        if r == 3:
            assert math.isnan(kept.gold_logp_R[r])
        elif r == 2:
            assert kept.gold_logp_R[r] == -INF
        else:
            assert float(kept.gold_logp_R[r]) == pytest.approx(math.log(p[r, labels[r]]), rel=1e-12)
    assert capture(logits).gold_logp_R.isnan().all()


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_tail_log_partition_is_that_of_the_entries_not_certain(estimator):
    logits = random_logits(10, seed=6)
    grid = (0.5, 1.0, 1.7, 4.0)
    kept = capture(
        logits, estimator=estimator, top_k=8, min_prob=0.02, threshold=0.3, temperatures=grid
    )
    assert kept.tail_log_partition_RT.shape == (10, 4)
    logp = torch.log_softmax(logits, -1)
    for r in range(10):
        certain = tokens(kept, r, certain=True)
        rest = [v for v in range(40) if v not in certain]
        for i, t in enumerate(grid):
            tail = math.log(sum(math.exp(float(logp[r, v]) / t) for v in rest))
            assert float(kept.tail_log_partition_RT[r, i]) == pytest.approx(tail, rel=1e-12)
        mass = sum(math.exp(float(logp[r, v])) for v in certain)
        assert mass + math.exp(float(kept.tail_log_partition_RT[r, 1])) == pytest.approx(1.0)


def test_padding_of_the_vocabulary_leaves_the_softmax_and_the_support():
    logits = random_logits(4, 50, seed=7)
    logits[:, 40:] = 30.0
    logits[1, 41], logits[2, 42] = NAN, INF
    for estimator in ("sampled", "topk", "full"):
        kept = capture(logits, estimator=estimator, num_tokens=40, labels_R=torch.full((4,), 45))
        assert (kept.ids_RK < 40).all()
        assert equal(kept, capture(logits[:, :40], estimator=estimator))


@pytest.mark.parametrize("estimator", ["sampled", "topk", "full"])
def test_rows_without_a_distribution_are_flagged_and_the_others_untouched(estimator):
    logits = random_logits(6, seed=8)
    clean = capture(logits, estimator=estimator, labels_R=torch.zeros(6, dtype=torch.int64))
    logits[1, 3], logits[2, 4], logits[4] = NAN, INF, -INF
    kept = capture(logits, estimator=estimator, labels_R=torch.zeros(6, dtype=torch.int64))
    bad, good = [1, 2, 4], [0, 3, 5]
    assert kept.count_R[bad].tolist() == [-1, -1, -1]
    assert (kept.ids_RK[bad] == -1).all()
    assert (kept.logp_RK[bad] == -INF).all()
    assert (kept.inclusion_RK[bad] == 0).all()
    for name in ("tail_log_partition_RT", "entropy_R", "top1_logp_R", "gold_logp_R"):
        assert getattr(kept, name)[bad].isnan().all()
    assert equal(rows(kept, good), rows(clean, good))


def test_masked_tokens_of_a_teacher_have_no_part_in_a_sample():
    logits = random_logits(5, seed=9)
    logits[:, ::2] = -INF
    kept = capture(logits, threshold=0.3, min_prob=0.1)
    assert all(v % 2 for r in range(5) for v in support(kept, r))
    assert torch.isfinite(kept.entropy_R).all()
    one_hot = torch.full((1, 40), -INF)
    one_hot[0, 17] = 3.0
    kept = capture(one_hot)
    assert support(kept, 0) == [17]
    assert float(kept.logp_RK[0, 0]) == 0.0
    assert float(kept.entropy_R[0]) == 0.0
    assert (kept.tail_log_partition_RT == -INF).all()


@pytest.mark.parametrize("estimator", ["sampled", "topk", "full"])
def test_any_dtype_and_stride_and_no_rows_at_all(estimator):
    logits = random_logits(5, seed=10).bfloat16()
    wide = torch.full((40, 10), NAN, dtype=torch.bfloat16)
    wide[:, ::2] = logits.T
    packed = capture(logits, estimator=estimator)
    assert packed.logp_RK.dtype == torch.float32
    assert equal(capture(wide[:, ::2].T, estimator=estimator), packed)
    assert capture(logits.double(), estimator=estimator).logp_RK.dtype == torch.float64
    none = capture(logits[:0], estimator=estimator)
    assert none.ids_RK.shape == (0, packed.ids_RK.shape[1])
    assert none.tail_log_partition_RT.shape == (0, len(TEMPERATURES))


def test_a_support_that_does_not_fit_says_so():
    # The flattest row there is: 2000 tokens at p = 0.0005, all wanted.
    kept = capture(torch.zeros(1, 2000), min_prob=0.0, threshold=1e-3)
    assert int(kept.count_R) == 2000
    assert kept.ids_RK.shape == (1, 256)


# --- log-partition -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["sampled", "topk", "full"])
def test_log_partition_is_exact_on_the_grid(estimator):
    logits = random_logits(8, 60, seed=11)
    kept = capture(logits, estimator=estimator, top_k=9, min_prob=0.03, threshold=0.2)
    certain = kept.inclusion_RK == 1
    logp = torch.log_softmax(logits, -1)
    for t in TEMPERATURES:
        found = log_partition(kept.logp_RK, certain, kept.tail_log_partition_RT, t)
        torch.testing.assert_close(found, (logp / t).logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_log_partition_between_grid_points_is_near_on_real_logits(estimator, real_logits):
    between, below = [], []
    for logits in real_logits[0]:
        kept = capture(logits, estimator=estimator)
        certain = kept.inclusion_RK == 1
        logp = torch.log_softmax(logits.double(), -1)
        for t in torch.linspace(0.55, 4.0, 24, dtype=torch.float64).tolist():
            found = log_partition(kept.logp_RK, certain, kept.tail_log_partition_RT, t)
            error = (found - (logp / t).logsumexp(-1)).abs()
            (between if t >= 1 else below).append(error)
    assert torch.stack(between).mean() < 5e-3
    assert torch.stack(between).max() < 3e-2
    assert torch.stack(below).max() < 5e-2  # the grid is coarse there: 0.036 near T = 0.7


def test_log_partition_on_the_grid_is_exact_on_real_logits(real_logits):
    for logits in real_logits[0]:
        kept = capture(logits)
        logp = torch.log_softmax(logits.double(), -1)
        for t in TEMPERATURES:
            found = log_partition(
                kept.logp_RK, kept.inclusion_RK == 1, kept.tail_log_partition_RT, t
            )
            assert (found - (logp / t).logsumexp(-1)).abs().max() < 1e-5


def test_default_sample_of_real_logits_has_the_documented_size(real_logits):
    logits, labels = real_logits
    counts = torch.cat([capture(x, labels_R=labels).count_R for x in logits]).double()
    assert 10 < counts.mean() < 60
    assert counts.max() < 256


def test_spline_weights_reproduce_cubics_and_sum_to_one():
    inverse = 1.0 / torch.tensor(TEMPERATURES, dtype=torch.float64)
    for t in (0.6, 0.99, 1.2, 1.75, 2.5, 3.7):
        weights = spline_weights(t)
        assert float(weights.sum()) == pytest.approx(1.0)
        for power in (1, 2, 3):
            assert float(weights @ inverse**power) == pytest.approx(t**-power, rel=1e-10)
    assert spline_weights(1.5).tolist() == [0, 0, 1, 0, 0, 0]
    shuffled = spline_weights(1.2, (3.0, 1.0, 2.0, 0.5))
    ordered = spline_weights(1.2, (0.5, 1.0, 2.0, 3.0))
    torch.testing.assert_close(shuffled[[3, 1, 2, 0]], ordered)


def test_log_partition_of_empty_tails_and_flagged_rows():
    p = [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [NAN, NAN, NAN]]
    logp = torch.tensor(p, dtype=torch.float64).log()
    certain = torch.ones(3, 3, dtype=torch.bool)
    tail = torch.full((3, 6), -INF, dtype=torch.float64)
    tail[2] = NAN
    for t in (1.0, 1.3, 2.0):
        found = log_partition(logp, certain, tail, t)
        expected = [math.log(0.5 ** (1 / t) + 0.3 ** (1 / t) + 0.2 ** (1 / t)), 0.0]
        assert found[:2].tolist() == pytest.approx(expected, abs=1e-12)
        assert math.isnan(found[2])
    # A flagged row of capture: no entries, statistics NaN.
    flagged = log_partition(torch.full((1, 3), -INF), certain[:1], torch.full((1, 6), NAN), 1.3)
    assert flagged.isnan().all()


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.4, 4.1, 0.0, -1.0, NAN])
def test_temperature_outside_the_grid_says_what_was_expected_and_found(temperature):
    with pytest.raises(ValueError, match=r"expected a value within the stored grid.*found"):
        spline_weights(temperature)


def test_short_grid_serves_its_own_points_only():
    assert spline_weights(2.0, (1.0, 2.0, 3.0)).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"expected a point of the stored grid.*found 1\.5"):
        spline_weights(1.5, (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("estimator", "top-k"),
        ("min_prob", -0.1),
        ("min_prob", 1.5),
        ("min_prob", NAN),
        ("threshold", 0.0),
        ("threshold", 2.0),
        ("sample_temperature", 0.5),
        ("top_k", 0),
        ("num_tokens", 41),
        ("num_tokens", 0),
        ("impl", "cuda"),
    ],
)
def test_options_out_of_range_say_what_was_expected_and_found(option, value):
    with pytest.raises(ValueError, match=rf"{option}: expected .*found.*{value}"):
        capture(random_logits(), **{option: value})


def test_shapes_that_do_not_fit_say_what_was_expected_and_found():
    logits = random_logits()
    with pytest.raises(ValueError, match=r"logits_RV: expected .* R x V .*found .*\(40,\)"):
        capture(logits[0])
    with pytest.raises(ValueError, match=r"logits_RV: expected a floating .*found torch\.int64"):
        capture(logits.long())
    for name in ("labels_R", "position_ids_R"):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(6,\), found \(5,\)"):
            capture(logits, **{name: torch.zeros(5, dtype=torch.int64)})
