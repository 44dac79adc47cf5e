"""What runs inside a server; its folder is on the server's PYTHONPATH."""
