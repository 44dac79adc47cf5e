"""Methods side by side: which runs there are, how they are started, and what they say together. No
torch.
"""
