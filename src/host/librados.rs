//! The Ceph library, opened at run time: where it is missing, nothing else is.
//!
//! The one file of foreign functions. It connects and sends commands, and knows neither what they mean nor deadlines:
//! a command blocks until it is answered. Why no timeout of the library's own: `rados_mon_op_timeout` lets
//! `rados_mgr_command` return while an answer may still be written to what was its stack.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use libloading::Library as Object;
use rustix::io::Errno;

/// Which daemon a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The monitors: maps, versions.
    Monitor,
    /// The manager: subvolumes.
    Manager,
}

/// What Ceph said about a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the command returned.
    pub errno: Errno,
    /// Its words, if it had any.
    pub message: String,
}

type Handle = *mut c_void;
type CommandFn = unsafe extern "C" fn(
    Handle,
    *const *const c_char,
    usize,
    *const c_char,
    usize,
    *mut *mut c_char,
    *mut usize,
    *mut *mut c_char,
    *mut usize,
) -> c_int;

/// `librados.so.2`, loaded. It costs some 14 MiB of memory, and stays for as long as the process.
pub struct Librados {
    create: unsafe extern "C" fn(*mut Handle, *const c_char, *const c_char, u64) -> c_int,
    set: unsafe extern "C" fn(Handle, *const c_char, *const c_char) -> c_int,
    connect: unsafe extern "C" fn(Handle) -> c_int,
    shutdown: unsafe extern "C" fn(Handle),
    fsid: unsafe extern "C" fn(Handle, *mut c_char, usize) -> c_int,
    to_monitor: CommandFn,
    to_manager: CommandFn,
    free: unsafe extern "C" fn(*mut c_char),
    version: unsafe extern "C" fn(*mut c_int, *mut c_int, *mut c_int),
    // Last: the functions above are only valid while it is loaded.
    _object: Object,
}

impl Librados {
    /// Loads the library.
    ///
    /// # Errors
    /// The loader's words, when there is no library or one that lacks a function.
    pub fn load() -> Result<Arc<Self>, String> {
        #[expect(unsafe_code, reason = "foreign functions")]
        // SAFETY: the library's initialisers do nothing but set up its own state; the types are those of
        // rados/librados.h, whose version 2 interface is stable.
        let loaded = unsafe {
            Object::new("librados.so.2").and_then(|object| {
                Ok(Self {
                    create: *object.get(b"rados_create2\0")?,
                    set: *object.get(b"rados_conf_set\0")?,
                    connect: *object.get(b"rados_connect\0")?,
                    shutdown: *object.get(b"rados_shutdown\0")?,
                    fsid: *object.get(b"rados_cluster_fsid\0")?,
                    to_monitor: *object.get(b"rados_mon_command\0")?,
                    to_manager: *object.get(b"rados_mgr_command\0")?,
                    free: *object.get(b"rados_buffer_free\0")?,
                    version: *object.get(b"rados_version\0")?,
                    _object: object,
                })
            })
        };
        loaded.map(Arc::new).map_err(|error| error.to_string())
    }

    /// The library's version, as it counts itself.
    pub fn version(&self) -> String {
        let (mut major, mut minor, mut extra) = (0, 0, 0);
        #[expect(unsafe_code, reason = "foreign function")]
        // SAFETY: it writes three integers.
        unsafe {
            (self.version)(&raw mut major, &raw mut minor, &raw mut extra);
        }
        format!("{major}.{minor}.{extra}")
    }

    /// Connects a user to the cluster of these monitors, waiting for them at most `patience`. Nothing is read from
    /// `/etc/ceph`, and nothing is logged.
    pub fn connect(
        self: &Arc<Self>,
        monitors: &str,
        user: &str,
        key: &str,
        patience: Duration,
    ) -> Result<Connection, Failure> {
        let unfit = |_| Failure { errno: Errno::INVAL, message: "a NUL byte in a name or key".to_owned() };
        let mut handle = ptr::null_mut();
        let name = CString::new(format!("client.{user}")).map_err(unfit)?;
        #[expect(unsafe_code, reason = "foreign function")]
        // SAFETY: both strings end in NUL and are copied; the handle is written on success.
        let result = unsafe { (self.create)(&raw mut handle, c"ceph".as_ptr(), name.as_ptr(), 0) };
        check(result)?;
        let mut connection = Connection { library: self.clone(), handle, fsid: String::new() };
        let patience = patience.as_secs().max(1).to_string();
        for (option, value) in [
            ("mon_host", monitors),
            ("key", key),
            ("client_mount_timeout", &patience),
            ("admin_socket", ""),
            ("log_file", ""),
            ("log_to_stderr", "false"),
            ("err_to_stderr", "false"),
        ] {
            let (option, value) = (CString::new(option).map_err(unfit)?, CString::new(value).map_err(unfit)?);
            #[expect(unsafe_code, reason = "foreign function")]
            // SAFETY: the handle is live, both strings end in NUL and are copied.
            check(unsafe { (self.set)(connection.handle, option.as_ptr(), value.as_ptr()) })?;
        }
        #[expect(unsafe_code, reason = "foreign function")]
        // SAFETY: the handle is live, and no other thread has it yet.
        check(unsafe { (self.connect)(connection.handle) })?;
        let mut text = [0; 64];
        #[expect(unsafe_code, reason = "foreign function")]
        // SAFETY: at most the buffer's length is written, with a NUL at the end.
        check(unsafe { (self.fsid)(connection.handle, text.as_mut_ptr(), text.len()) })?;
        #[expect(unsafe_code, reason = "foreign string")]
        // SAFETY: the buffer was zeroed and is longer than any fsid.
        let fsid = unsafe { CStr::from_ptr(text.as_ptr()) };
        connection.fsid = fsid.to_string_lossy().into_owned();
        Ok(connection)
    }
}

/// A user's connection to a cluster. It finds the daemons again by itself after they were away.
pub struct Connection {
    library: Arc<Librados>,
    handle: Handle,
    fsid: String,
}

#[expect(unsafe_code, reason = "a raw pointer is neither Send nor Sync")]
// SAFETY: librados.h: a cluster handle may be used from several threads.
unsafe impl Send for Connection {}
#[expect(unsafe_code, reason = "a raw pointer is neither Send nor Sync")]
// SAFETY: as above.
unsafe impl Sync for Connection {}

impl Connection {
    /// The cluster's own id.
    pub fn fsid(&self) -> &str {
        &self.fsid
    }

    /// Sends a command, in JSON, and blocks until it has been answered: for as long as the daemon is away, if need be.
    pub fn command(&self, target: Target, command: &str) -> Result<Vec<u8>, Failure> {
        let unfit = |_| Failure { errno: Errno::INVAL, message: "a NUL byte in a command".to_owned() };
        let command = CString::new(command).map_err(unfit)?;
        let commands = [command.as_ptr()];
        let (mut output, mut words) = (Buffer::of(&self.library), Buffer::of(&self.library));
        let send = match target {
            Target::Monitor => self.library.to_monitor,
            Target::Manager => self.library.to_manager,
        };
        #[expect(unsafe_code, reason = "foreign function")]
        // SAFETY: the handle is live for as long as `self`; the command ends in NUL and outlives the call; what is
        // written to the two buffers is freed by them.
        let result = unsafe {
            send(
                self.handle,
                commands.as_ptr(),
                commands.len(),
                ptr::null(),
                0,
                &raw mut output.start,
                &raw mut output.length,
                &raw mut words.start,
                &raw mut words.length,
            )
        };
        match check(result) {
            Ok(()) => Ok(output.bytes().to_vec()),
            Err(failure) => {
                Err(Failure { message: String::from_utf8_lossy(words.bytes()).trim().to_owned(), ..failure })
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "foreign function")]
        // SAFETY: the last owner is gone, so no call is under way, and nobody uses the handle again.
        unsafe {
            (self.library.shutdown)(self.handle);
        }
    }
}

/// What the library has allocated.
struct Buffer<'a> {
    library: &'a Librados,
    start: *mut c_char,
    length: usize,
}

impl<'a> Buffer<'a> {
    fn of(library: &'a Librados) -> Self {
        Self { library, start: ptr::null_mut(), length: 0 }
    }

    fn bytes(&self) -> &[u8] {
        if self.start.is_null() {
            return &[];
        }
        #[expect(unsafe_code, reason = "a foreign buffer")]
        // SAFETY: the library wrote both, and the buffer lives until it is dropped.
        unsafe {
            std::slice::from_raw_parts(self.start.cast(), self.length)
        }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if !self.start.is_null() {
            #[expect(unsafe_code, reason = "foreign function")]
            // SAFETY: the library allocated it, and it is freed once.
            unsafe {
                (self.library.free)(self.start);
            }
        }
    }
}

fn check(result: c_int) -> Result<(), Failure> {
    if result < 0 { Err(Failure { errno: Errno::from_raw_os_error(-result), message: String::new() }) } else { Ok(()) }
}
