"""The paper's training corpus, drawn from two public sets."""
