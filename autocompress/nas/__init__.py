"""Architecture search: spaces, searches by gradient over supernets, searches by samples, zero-cost scores."""
