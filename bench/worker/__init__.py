"""The process in which one backend is measured, and the other end of its pipe."""
