"""Pages and plots made from run folders; imports no torch."""
