"""Who names experts in a job means these, and not all linear layers beside them."""

from minilora.job.given import job_from

BASIC = {"model": "m", "data": "d.jsonl", "out": "o"}


def test_named_experts_take_the_place_of_all_linear():
    names = ["experts.gate_up_proj"]
    assert job_from(BASIC | {"target_parameters": names}).lora.target_modules is None
    both = job_from(BASIC | {"target_parameters": names, "target_modules": "all-linear"}).lora
    assert both.target_modules == "all-linear" and both.target_parameters == tuple(names)
    assert job_from(BASIC).lora.target_modules == "all-linear"
