"""What transmitter and receiver share, and the channel between them."""
