"""What a server says about itself on SGLang's Prometheus endpoint. Every figure is read from the `hq` block of /server_info."""
