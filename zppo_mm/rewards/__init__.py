"""From a response and an answer to a reward. No torch."""
