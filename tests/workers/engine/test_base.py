"""Engine profiles refuse what cannot run; resume promises are stated per feature."""

import pytest

from workers.engine.base import EngineProfile, ProfileError, SamplingSpec, resume_blockers


def test_a_profile_survives_the_wire() -> None:
    profile = EngineProfile(engine="toy", max_num_seqs=3, toy_step_ms=0.5, block_size=32)
    assert EngineProfile.from_json(profile.to_json()) == profile
    assert EngineProfile.from_json({}) == EngineProfile()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"engine": "abacus"}, "engine = 'abacus'"),
        ({"dtype": "int3"}, "dtype = 'int3'"),
        ({"max_model_len": 0}, "max_model_len = 0"),
        ({"max_num_seqs": 0}, "max_num_seqs = 0"),
        ({"kv_cache_bytes": 1}, "kv_cache_bytes = 1"),
        ({"max_num_batched_tokens": 1}, "max_num_batched_tokens = 1"),
        ({"toy_step_ms": -1}, "toy_step_ms = -1"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"max_num_seqs": 1.5}, "max_num_seqs"),
        ({"gpu_go_faster": True}, "gpu_go_faster"),
    ],
)
def test_bad_profiles_name_the_knob(data: dict, says: str) -> None:
    with pytest.raises(ProfileError, match=r"allowed|unknown knob|Expected") as caught:
        EngineProfile.from_json(data)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("sampling", "blockers"),
    [
        ({"temperature": 0.0}, ()),
        ({"temperature": 0.7}, ()),
        ({"temperature": 0.7, "seed": 1}, ("seed",)),
        ({"temperature": 0.0, "seed": 1}, ()),
        ({"temperature": 0.0, "repetition_penalty": 1.2, "stop": ("x",)}, ()),
        ({"presence_penalty": 1.0, "frequency_penalty": 1.0}, ()),
        (
            {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.1},
            ("presence_penalty", "frequency_penalty"),
        ),
    ],
)
def test_what_keeps_a_resume_from_keeping_its_promise(sampling: dict, blockers: tuple[str, ...]) -> None:
    assert resume_blockers(SamplingSpec(max_tokens=9, **sampling)) == blockers
