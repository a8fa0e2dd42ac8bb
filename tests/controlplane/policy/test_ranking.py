"""A ranking is a set sorted by score and name."""

from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy.ranking import Ranking

_step = st.tuples(st.sampled_from(["put", "drop"]), st.sampled_from("abcdefgh"), st.integers(0, 4))


@given(st.lists(_step, max_size=300))
def test_it_orders_as_a_sorted_set_does(steps: list[tuple[str, str, int]]) -> None:
    ranking, model = Ranking(), dict[str, int]()
    for kind, name, score in steps:
        if kind == "put":
            ranking.put(name, score)
            model[name] = score
        else:
            assert ranking.drop(name) is (model.pop(name, None) is not None)
        ordered = sorted(model, key=lambda name: (model[name], name))
        assert len(ranking) == len(model)
        assert ranking.lowest(3) == ordered[:3]
        assert ranking.lowest(100) == ordered
        assert ranking.least() == (model[ordered[0]] if ordered else None)
        if ordered:
            assert ranking.first() == ordered[0]
    assert ranking.items() == model
