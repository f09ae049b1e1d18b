package nbdlocal

// The numbers of the NBD protocol, named as its specification names them without the
// prefix NBD. Everything on the wire is big-endian.

// Handshake.
const (
	initMagic     = 0x4e42444d41474943 // "NBDMAGIC"
	optMagic      = 0x49484156454f5054 // "IHAVEOPT"
	optReplyMagic = 0x0003e889045565a9

	flagFixedNewstyle = 1 << 0 // the server's and the client's alike
	flagNoZeroes      = 1 << 1

	exportNameZeroes = 124 // bytes after the reply to OPT_EXPORT_NAME without NO_ZEROES
	maxNameBytes     = 4096
)

// Options of the handshake.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
	optExtendedHeaders = 11
)

// Replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsup        = 1<<31 + 1
	repErrPolicy       = 1<<31 + 2
	repErrInvalid      = 1<<31 + 3
	repErrTLSReqd      = 1<<31 + 5
	repErrUnknown      = 1<<31 + 6
	repErrTooBig       = 1<<31 + 9
	repErrExtHeaderReq = 1<<31 + 10
)

// Information about an export.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags.
const (
	flagHasFlags           = 1 << 0
	flagReadOnly           = 1 << 1
	flagSendFlush          = 1 << 2
	flagSendFUA            = 1 << 3
	flagSendTrim           = 1 << 5
	flagSendWriteZeroes    = 1 << 6
	flagSendDF             = 1 << 7
	flagCanMultiConn       = 1 << 8
	flagSendCache          = 1 << 10
	flagSendFastZero       = 1 << 11
	flagBlockStatusPayload = 1 << 12
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags.
const (
	cmdFlagFUA        = 1 << 0
	cmdFlagNoHole     = 1 << 1
	cmdFlagDF         = 1 << 2
	cmdFlagReqOne     = 1 << 3
	cmdFlagFastZero   = 1 << 4
	cmdFlagPayloadLen = 1 << 5 // extended headers only
)

// Messages of the transmission phase. With extended headers all are of the extended
// kind, else requests are compact, and replies simple or structured.
const (
	requestMagic         = 0x25609513
	simpleReplyMagic     = 0x67446698
	structuredReplyMagic = 0x668e33ef
	extendedRequestMagic = 0x21e41c71
	extendedReplyMagic   = 0x6e8a278c

	requestBytes         = 28
	simpleReplyBytes     = 16
	structuredReplyBytes = 20
	extendedRequestBytes = 32
	extendedReplyBytes   = 32

	replyFlagDone = 1 << 0

	replyNone           = 0
	replyOffsetData     = 1
	replyOffsetHole     = 2
	replyBlockStatus    = 5
	replyBlockStatusExt = 6
	replyError          = 1<<15 + 1
)

// State flags of the metadata context base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

const (
	// maxPayloadBytes is the largest read or write. It is what every client may rely
	// on, and the kernel's own limit.
	maxPayloadBytes = 32 << 20
	// hostilePayloadBytes is what no client sends by mistake: it is not even thrown
	// away.
	hostilePayloadBytes = 2 * maxPayloadBytes
)
