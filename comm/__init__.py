"""Who the processes are (topology), how they meet (rendezvous), and how tensors move (backends)."""
