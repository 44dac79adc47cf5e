"""Which layout a run should have on given GPUs: memory by part and step time by phase, from shapes
and rates, before anything is loaded.
"""
