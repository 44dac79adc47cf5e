"""The gate before the first update, and later between steps: sampling, training and the source
checkpoint give the same log-probs, and no medium is lost.
"""
