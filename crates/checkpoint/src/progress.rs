//! How long work reports what it has done.

/// Receives the progress of work that goes through a model. All methods may be called from any thread.
pub trait Progress: Sync {
    /// The work begins. It will go through this many bytes of the source.
    fn begin(&self, _bytes: u64) {}

    /// Work on a tensor or a module begins.
    fn item(&self, _name: &str) {}

    /// This many more bytes of the source are done.
    fn advance(&self, _bytes: u64) {}
}

/// Ignores progress.
impl Progress for () {}
