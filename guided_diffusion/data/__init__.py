"""Pictures, labels and the conditioning made of them."""
