"""What happens at the escrow, told to those it concerns; read from the entries of the books."""
