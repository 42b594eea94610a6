"""Pictures of timelines. The only room that imports matplotlib, and never pyplot's global state."""
