"""One rank of a plan alone on one device, and its work counted as it is dispatched."""
