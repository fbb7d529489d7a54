"""What the scripts stand on and the tutorial does not teach."""
