"""The papers' formulas: tensors in, tensors out."""
