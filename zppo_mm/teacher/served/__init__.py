"""Teacher and judge behind servers that speak the chat completions protocol."""
