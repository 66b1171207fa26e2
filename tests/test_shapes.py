"""The shapes of users' jobs: sites, ranks, how these hold the model, how sites average it, what is computed.

Every two settings that can meet do meet in one of 15 shapes (shapes.py: the settings, the covering, what a
run must show). Coordinator and sites end well, `coordinator.py check` holds, all sites agree on each round's
bits; on the virtual clock the losses are those of one rank a site, and the same run once more gives the same
bits.

Real torchrun, as typed, starts the several ranks of the two smallest shapes, one under DDP, one under FSDP2.
All others start warm: the same agent, whose workers are forked with torch loaded (warm.py), and sites of one
rank without it.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import combinations, product

import pytest
import shapes
import torch
from shapes import SETTINGS, SMALLEST, Lab, Shape, missing, pairwise

from data import Corpus, Feed, split_rows

PAIRWISE = pairwise()
AT_ONCE = 2  # runs: they wait for one another's starts more than for a core


def params(tried: list[Shape], *marks):
    reason = "model.compile needs a C++ compiler, and neither g++ nor c++ is here"
    no_compiler = pytest.mark.skipif(not shapes.compiler(), reason=reason)
    return [pytest.param(s, id=str(s), marks=[*marks, *[no_compiler] * s.compile]) for s in tried]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, corpus, warm):
    made = Lab(tmp_path_factory.mktemp("shapes"), corpus, warm)
    yield made
    made.close()


@pytest.fixture(scope="module")
def proofs(request, lab):
    """shape -> the Future of its proof, of all that are asked for: AT_ONCE are under way at a time."""
    items = [i for i in request.session.items if i.path == request.path and "proofs" in i.fixturenames]
    asked = [i.callspec.params["shape"] for i in items]
    asked = [shape for shape in asked if shapes.compiler() or not shape.compile]
    pool = ThreadPoolExecutor(AT_ONCE)
    yield {shape: pool.submit(lab.prove, shape, shape == SMALLEST[0]) for shape in asked}
    lab.close()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("shape", params(PAIRWISE, pytest.mark.slow))
def test_a_shape_holds(proofs, shape):
    proofs[shape].result()


@pytest.mark.parametrize("shape", params(SMALLEST))
def test_the_smallest_of_several_ranks_hold_under_torchrun_itself(lab, shape):
    run = lab.run(shape, cold=True, check=True)
    shapes.sound(shape, run)
    shapes.alike(shape, run, lab.reference(shape))


@pytest.mark.slow
@pytest.mark.parametrize("clock", SETTINGS["clock"])
def test_a_site_of_two_ranks_sends_again_what_arrived_damaged(lab, clock):
    """Either site may be asked: the sender of a local round itself, of a federated one the other."""
    run = lab.run(Shape(ranks="two", clock=clock), fault="upload:2", check=True)
    faults = [r["kind"] for r in run.journal if r["type"] == "fault"]
    assert faults in (["spoiled upload"], ["wrong base"]), "damaged, noticed, and nobody lost over it"
    assert run.summary["tokens"] == sum(r["tokens"] for r in run.journal if r["type"] == "commit")


# -- the covering --------------------------------------------------------------------------------------------


def test_every_two_settings_that_can_meet_do():
    names = combinations(SETTINGS, 2)
    every = {((x, v), (y, w)) for x, y in names for v, w in product(SETTINGS[x], SETTINGS[y])}
    never = (("one", "fsdp"), ("one", "mixed"), ("first", "mixed"), ("last", "mixed"))
    cannot = {(("ranks", ranks), ("parallel", parallel)) for ranks, parallel in never}
    both = {pair for shape in PAIRWISE for pair in combinations(asdict(shape).items(), 2)}
    assert both == every - cannot, every - cannot - both
    assert shapes.pairs() == {frozenset(pair) for pair in every - cannot}
    assert len(cannot) == len(shapes.IMPOSSIBLE)
    assert all(shapes.possible(asdict(shape)) for shape in PAIRWISE) and set(SMALLEST) <= set(PAIRWISE)


def test_a_covering_without_its_last_shape_or_with_a_setting_taken_away_is_found_out():
    assert missing(PAIRWISE) == set() and missing(PAIRWISE[:-1])
    for name, values in SETTINGS.items():
        kept = [s for s in PAIRWISE if getattr(s, name) != values[-1]]
        lost = missing(kept)
        assert lost and {(name, values[-1])} <= frozenset.union(*lost)


def test_the_covering_is_the_same_each_time_and_small():
    assert pairwise() == PAIRWISE and len(set(PAIRWISE)) == len(PAIRWISE) <= 15
    assert sum(shape.compile for shape in PAIRWISE) <= 4  # these take longest


def test_a_shape_is_where_its_reference_is_but_for_what_only_rounds():
    for shape in PAIRWISE:
        free = {"ranks", "parallel", "compile", "checkpointing", "clock"}
        free |= {"topology"} if shape.wire == "fp32" else set()
        ours, plain = asdict(shape), asdict(shape.reference)
        assert {name for name in SETTINGS if ours[name] != plain[name]} <= free
        assert shape.reference.reference == shape.reference and set(shape.reference.layout.values()) == {1}


@pytest.mark.parametrize("ranks, splits", [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (3, 2), (4, 3)])
def test_an_inner_step_sees_the_same_rows_however_many_ranks_there_are(runner, ranks, splits):
    changes = {"model": {"seq_len": 16}, "data": {"tokens_per_step": 12 * 16}, "budget": {"tokens": 12 * 16}}
    corpus = Corpus(runner.load(runner.write({"a": {}}, **changes)))
    whole, _ = corpus.batch(5)
    taken = [Feed(corpus, rank, ranks, torch.device("cpu")).take(5, [], splits)[0] for rank in range(ranks)]
    for (first, stop), (a, b) in zip(split_rows(12, splits), split_rows(12 // ranks, splits), strict=True):
        assert torch.equal(torch.cat([ids[a:b] for ids in taken]), whole[first:stop])
