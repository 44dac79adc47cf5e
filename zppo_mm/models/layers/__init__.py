"""What decoder layers are built from, and how packed sequences pass through them."""
