//! GPU integration tests of liquidgemm.
