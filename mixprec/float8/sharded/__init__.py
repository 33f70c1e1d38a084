"""FP8 layers whose weight is cut up over ranks."""
