"""The parts of a step that `zppo_mm.step` tells as a story."""
