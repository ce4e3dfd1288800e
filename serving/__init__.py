"""Ray Serve application that grades images over HTTP."""
