"""Small question sets that are made on the spot: digits, sums, easy-VQA."""
