"""Networks and the results matrix for image classification."""
