"""What happens around the loop: saving, logging, progress. One small protocol; users add their own."""
