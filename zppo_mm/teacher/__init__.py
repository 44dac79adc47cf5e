"""The frozen teacher: answers hard questions and compresses candidates."""
