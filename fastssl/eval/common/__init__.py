"""What several evaluation protocols share."""
