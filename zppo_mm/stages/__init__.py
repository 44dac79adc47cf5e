"""The parts of a step, which `zppo_mm.step` puts together."""
